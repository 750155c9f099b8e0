# SPDX-License-Identifier: Apache-2.0
"""Takes the linker's filling out of what a kernel loads.

With page-table isolation the kernel's entry code has 2 MiB of text to itself, and text ends at the
next 2 MiB (arch/x86/kernel/vmlinux.lds.S): 4 MiB of 0xcc, which each VM would have in its memory.
Nothing reads or runs them.  Structures: the ELF-64 object file format, System V ABI.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER, _ADDRESS_OF_TABLE, _SIZES = 64, 32, 54
_LOAD, _EXECUTABLE = 1, 1
_PAGE = 4096
_FILLED = b"\xcc" * _PAGE
_WORTH_IT = 16  # pages


@dataclass(frozen=True)
class _Segment:
    """A program header; sizes and addresses in bytes."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    length: int
    memory: int
    alignment: int

    LAYOUT = struct.Struct("<IIQQQQQQ")

    def part(self, begin: int, end: int, memory: int) -> _Segment:
        return dataclasses.replace(
            self,
            offset=self.offset + begin,
            address=self.address + begin,
            physical=self.physical + begin,
            length=end - begin,
            memory=memory,
        )


def without_padding(kernel: bytes) -> bytes:
    """The same file, whose executable segments are split around pages of filling.

    Raises:
        ValueError: it is no 64-bit ELF file.
    """
    if len(kernel) < _HEADER or kernel[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", kernel, _ADDRESS_OF_TABLE)
    size, count = struct.unpack_from("<HH", kernel, _SIZES)
    before = [
        _Segment(*_Segment.LAYOUT.unpack_from(kernel, start + index * size))
        for index in range(count)
    ]
    after = [part for segment in before for part in _split(segment, kernel)]
    table = b"".join(_Segment.LAYOUT.pack(*dataclasses.astuple(part)) for part in after)
    if size != _Segment.LAYOUT.size or min(s.offset for s in before) < start + len(table):
        return kernel  # no room for a longer table
    changed = bytearray(kernel)
    changed[start : start + len(table)] = table
    struct.pack_into("<H", changed, _SIZES + 2, len(after))
    return bytes(changed)


def _split(segment: _Segment, kernel: bytes) -> Iterator[_Segment]:
    begin = 0
    if segment.kind == _LOAD and segment.flags & _EXECUTABLE:
        for start, end in _filled(kernel[segment.offset : segment.offset + segment.length]):
            if start > begin:
                yield segment.part(begin, start, start - begin)
            begin = end
    if begin < segment.memory or not begin:
        yield segment.part(begin, segment.length, segment.memory - begin)


def _filled(data: bytes) -> Iterator[tuple[int, int]]:
    """Runs of pages with nothing else in them, long enough to be worth a program header."""
    begin = 0
    for offset in range(0, len(data) + _PAGE, _PAGE):
        if data[offset : offset + _PAGE] == _FILLED:
            continue
        if offset - begin >= _WORTH_IT * _PAGE:
            yield begin, offset
        begin = offset + _PAGE
