# SPDX-License-Identifier: Apache-2.0
"""Disks of the host for tests: files with file systems, loop devices, direct-assigned volumes."""

from __future__ import annotations

import contextlib
import json
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


def xfs(path: Path, size: int = 32 << 20) -> Path:
    """A file with a file system, smaller than mkfs.xfs likes."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", "--unsupported", path], check=True, capture_output=True)
    return path


def direct_volume(prefix: Path, *words: str) -> str:
    """What `kata-runtime direct-volume` says."""
    command = [str(prefix / "bin/kata-runtime"), "direct-volume", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def record(device: Path | str, fstype: str = "ext4", **more: object) -> str:
    """What `direct-volume add` takes as ``--mount-info``."""
    return json.dumps({"volume-type": "block", "device": str(device), "fstype": fstype} | more)


def total_bytes(prefix: Path, volume: Path) -> int:
    """The size that the guest sees of a mounted volume."""
    figures = json.loads(direct_volume(prefix, "stats", "--volume-path", str(volume)))
    size, inodes = figures["usage"]
    assert (size["unit"], inodes["unit"]) == (1, 2)
    return int(size["total"])


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
