# SPDX-License-Identifier: Apache-2.0
"""Disks of the host for tests: files with file systems, loop devices."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


def ext4(path: Path, size: int = 16 << 20, content: Path | None = None) -> Path:
    """A file with a file system, with the files of a directory in it."""
    with path.open("wb") as file:
        file.truncate(size)
    more = ["-d", str(content)] if content is not None else []
    subprocess.run(["mkfs.ext4", "-q", "-F", *more, str(path)], check=True)
    return path


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """A block device over a file."""
    done = subprocess.run(
        ["losetup", "--find", "--show", path], check=True, capture_output=True, text=True
    )
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def mounted(path: Path, point: Path, *options: str) -> Iterator[Path]:
    """A file system mounted on the host."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, path, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)
