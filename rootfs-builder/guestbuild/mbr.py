# SPDX-License-Identifier: Apache-2.0
"""A disk image with a master boot record and one partition."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

SECTOR = 512
# Partition 1 starts here. A multiple of 2 MiB would serve huge mappings of the image when it is
# plugged as persistent memory; 1 MiB is what partitioning tools do.
START = 1 << 20
_LINUX = 0x83
_LIMIT = (1 << 32) - 1  # sectors that the format can count


def table(size: int, disk_id: int = 0x6174616B) -> bytes:
    """The 512 bytes of an MBR with one Linux partition of `size` bytes at START.

    Raises:
        ValueError: The size is no multiple of a sector, or too large for the format.
    """
    if size <= 0 or size % SECTOR or size // SECTOR > _LIMIT:
        raise ValueError(f"{size} bytes: not a partition's size")
    no_geometry = b"\xfe\xff\xff"  # cylinder/head/sector fields: "see the sector numbers"
    entry = struct.pack(
        "<B3sB3sII", 0, no_geometry, _LINUX, no_geometry, START // SECTOR, size // SECTOR
    )
    return struct.pack("<440xIH", disk_id, 0) + entry.ljust(64, b"\0") + b"\x55\xaa"


def wrap(filesystem: Path, image: Path) -> None:
    """Write an image whose partition 1 is a file system, filled up to whole MiB."""
    mebibyte = 1 << 20
    size = filesystem.stat().st_size
    padded = -(-size // mebibyte) * mebibyte
    with filesystem.open("rb") as source, image.open("wb") as target:
        target.write(table(padded))
        target.seek(START)
        shutil.copyfileobj(source, target, mebibyte)
        target.truncate(START + padded)
