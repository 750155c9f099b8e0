# SPDX-License-Identifier: Apache-2.0
"""Packs a root into an image (erofs in partition 1) or an initrd."""

from __future__ import annotations

import os
from pathlib import Path

from guestbuild import cpio, mbr
from guestbuild.command import run
from guestbuild.description import Image
from guestbuild.errors import BuildError

# Owner's and group's ids are the files' own: packages with several users (mail, staff) are few.
_EPOCH = "0"


def write_image(root: Path, target: Path, options: Image) -> None:
    """An MBR image with an erofs of the root.

    Raises:
        BuildError: mkfs.erofs fails or doesn't know the compression.
    """
    scratch = target.with_suffix(".erofs")
    compression = [] if options.compression == "none" else [f"-z{options.compression}"]
    fixed = ["-T", os.environ.get("SOURCE_DATE_EPOCH", _EPOCH), "-U", options.uuid]
    try:
        run(["mkfs.erofs", "--quiet", *compression, *fixed, scratch, root])
        mbr.wrap(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def write_initrd(root: Path, target: Path, options: Image) -> None:
    """A cpio archive of the root; `/init` in it is PID 1."""
    plain = target.with_suffix(".cpio")
    try:
        with plain.open("wb") as stream:
            archive = cpio.Writer(stream, int(os.environ.get("SOURCE_DATE_EPOCH", _EPOCH)))
            archive.tree(root)
            archive.symlink("init", "usr/sbin/init")
            archive.close()
        compress(plain, target, options.initrd_compression)
    finally:
        plain.unlink(missing_ok=True)


def compress(source: Path, target: Path, method: str) -> None:
    """Compress an initrd in a format that the kernel unpacks."""
    if method == "none":
        source.replace(target)
    elif method == "zstd":
        run(["zstd", "--quiet", "--force", "-19", "-T1", "-o", target, source])
    elif method in ("lz4", "lz4hc"):
        # The kernel reads the legacy frame only.
        run(["lz4", "-l", "-9", "--force", "--quiet", source, target])
    else:
        raise BuildError(f"an initrd can't be compressed by {method}")
