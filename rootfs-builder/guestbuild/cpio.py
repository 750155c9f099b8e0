# SPDX-License-Identifier: Apache-2.0
"""cpio archives in the `newc` format, as the kernel unpacks them (an initrd).

The format is described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from guestbuild import tree

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class Writer:
    """Writes members with inode numbers counted up and one fixed time: the same bytes each time."""

    def __init__(self, stream: BinaryIO, mtime: int = 0) -> None:
        self._stream = stream
        self._mtime = mtime
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> None:
        self._member(name, stat.S_IFDIR | mode, b"", owner)

    def file(
        self, name: str, data: bytes, mode: int = 0o644, owner: tuple[int, int] = (0, 0)
    ) -> None:
        self._member(name, stat.S_IFREG | mode, data, owner)

    def symlink(self, name: str, target: str) -> None:
        self._member(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._member(name, stat.S_IFCHR | mode, b"", device=(major, minor))

    def tree(self, root: Path) -> None:
        """Everything below a folder; devices, sockets and fifos are left out."""
        for path in tree.walk(root):
            name = str(path.relative_to(root))
            status = path.lstat()
            owner = (status.st_uid, status.st_gid)
            mode = stat.S_IMODE(status.st_mode)
            if path.is_symlink():
                self.symlink(name, os.readlink(path))
            elif path.is_dir():
                self.directory(name, mode, owner)
            elif path.is_file():
                self.file(name, path.read_bytes(), mode, owner)

    def close(self) -> None:
        """Write the trailer. The stream stays open."""
        self._inode = -1
        self._member(_TRAILER, 0, b"")

    def _member(
        self,
        name: str,
        mode: int,
        data: bytes,
        owner: tuple[int, int] = (0, 0),
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        encoded = name.encode() + b"\0"
        fields = (
            *(self._inode, mode, *owner, links, self._mtime, len(data)),
            *(0, 0, *device, len(encoded), 0),
        )
        header = _MAGIC + b"".join(b"%08X" % field for field in fields)
        self._stream.write(_padded(header + encoded) + _padded(data))


def names(data: bytes) -> Iterable[tuple[str, int, bytes]]:
    """(name, mode, content) of each member of an archive.

    Raises:
        ValueError: Not an archive of this format, or cut short.
    """
    offset = 0
    while True:
        header = data[offset : offset + 110]
        if len(header) < 110 or header[:6] != _MAGIC:
            raise ValueError(f"no cpio member at byte {offset}")
        fields = [int(header[at : at + 8], 16) for at in range(6, 110, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[offset + 110 : offset + 110 + name_size - 1].decode()
        start = offset + -(-(110 + name_size) // 4) * 4
        offset = start + -(-size // 4) * 4
        if len(data) < offset:
            raise ValueError(f"{name}: cut short")
        if name == _TRAILER:
            return
        yield name, mode, data[start : start + size]


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
