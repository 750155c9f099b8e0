# SPDX-License-Identifier: Apache-2.0
"""Takes a library that a 64-bit ELF file names but doesn't use out of its list.

Wheels are often linked with libstdc++ without a single symbol of it; loading it costs an emulated
guest more than the wheel's own library. Structures: the ELF-64 object file format, System V ABI.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_LOAD, _DYNAMIC = 1, 2  # program header types
_NULL, _NEEDED, _STRTAB = 0, 1, 5  # dynamic tags
_VERNEED, _VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_ENTRY = struct.Struct("<QQ")


class _File:
    """The parts of an ELF file that matter here.

    Raises:
        ValueError: Not a 64-bit little-endian ELF file, or one without a dynamic section.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit ELF file")
        self.data = data
        (start,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        self._loads: list[tuple[int, int, int]] = []
        self.dynamic = (0, 0)
        for index in range(count):
            kind, _, offset, address, _, length, _, _ = struct.unpack_from(
                "<IIQQQQQQ", data, start + index * size
            )
            if kind == _LOAD:
                self._loads.append((address, offset, length))
            elif kind == _DYNAMIC:
                self.dynamic = (offset, length)
        if not self.dynamic[1]:
            raise ValueError("no dynamic section")

    def offset(self, address: int) -> int:
        for start, offset, length in self._loads:
            if start <= address < start + length:
                return address - start + offset
        raise ValueError(f"address {address:#x} is not in the file")

    def entries(self) -> Iterator[tuple[int, int]]:
        start, length = self.dynamic
        for at in range(start, start + length, _ENTRY.size):
            tag, value = _ENTRY.unpack_from(self.data, at)
            yield tag, value
            if tag == _NULL:
                return

    def text(self, address: int) -> str:
        start = self.offset(address)
        return self.data[start : self.data.index(b"\0", start)].decode()


def needed(data: bytes) -> list[str]:
    """Names of the libraries that a file asks the loader for."""
    file = _File(data)
    strings = dict(file.entries())[_STRTAB]
    return [file.text(strings + value) for tag, value in file.entries() if tag == _NEEDED]


def drop_needed(data: bytes, library: str) -> bytes:
    """The file without the library in its list.

    Raises:
        ValueError: It isn't in the list, or versioned symbols of it are used.
    """
    file = _File(data)
    tags = dict(file.entries())
    strings = tags[_STRTAB]
    if library in _versions(file, tags, strings):
        raise ValueError(f"symbols of {library} are used")
    kept = [
        (tag, value)
        for tag, value in file.entries()
        if tag != _NEEDED or file.text(strings + value) != library
    ]
    missing = len(list(file.entries())) - len(kept)
    if not missing:
        raise ValueError(f"{library} is not asked for")
    packed = b"".join(_ENTRY.pack(*entry) for entry in kept + [(_NULL, 0)] * missing)
    start = file.dynamic[0]
    return data[:start] + packed + data[start + len(packed) :]


def _versions(file: _File, tags: dict[int, int], strings: int) -> Iterator[str]:
    """Libraries of which versioned symbols are used."""
    if _VERNEED not in tags:
        return
    at = file.offset(tags[_VERNEED])
    for _ in range(tags[_VERNEEDNUM]):
        _, _, name, _, following = struct.unpack_from("<HHIII", file.data, at)
        yield file.text(strings + name)
        at += following
