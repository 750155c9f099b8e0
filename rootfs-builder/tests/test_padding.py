# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from guestbuild.padding import without_padding

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
# As vmlinux: the headers are in no segment, text has filling in the middle and at its end.
PROGRAM = """
.globl _start
_start:
    jmp finish
.fill 300000, 1, 0xcc
.balign 4096
finish:
    mov $60, %eax
    mov $7, %edi
    syscall
.fill 200000, 1, 0xcc
"""
SCRIPT = """
PHDRS { text PT_LOAD FLAGS(5); data PT_LOAD FLAGS(6); }
SECTIONS {
  . = 0x400000; .text : { *(.text) } :text
  . = 0x800000; .data : { BYTE(1) . = . + 200000; } :data =0xcccccccc
  /DISCARD/ : { *(*) }
}
ENTRY(_start)
"""


def program(tmp_path: Path, text: str = PROGRAM) -> bytes:
    (tmp_path / "x.s").write_text(text)
    (tmp_path / "x.ld").write_text(SCRIPT)
    command = ["gcc", "-nostdlib", "-static", "-Wl,--build-id=none", "-T", "x.ld", "-o", "x", "x.s"]
    subprocess.run(command, cwd=tmp_path, check=True)
    return (tmp_path / "x").read_bytes()


def loads(data: bytes) -> list[tuple[int, int, int, int]]:
    """Flags, address, length in the file and in memory of each segment."""
    (count,) = struct.unpack_from("<H", data, 56)
    found = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * index) for index in range(count)]
    return [
        (flags, address, length, memory) for _, flags, _, address, _, length, memory, _ in found
    ]


@needs_compiler
def test_a_program_without_its_filling_is_smaller_in_memory_and_runs(tmp_path: Path) -> None:
    before = program(tmp_path)
    after = without_padding(before)
    text, data = loads(before)
    first, second, *rest = loads(after)
    assert text[2] > 500_000
    assert first == (5, 0x400000, 4096, 4096)
    assert (second[0], second[1] % 4096) == (5, 0)
    assert sum(memory for *_, memory in (first, second, *rest[:-1])) < 5 * 4096
    assert rest[-1] == data  # 0xcc in data is data
    changed = tmp_path / "y"
    changed.write_bytes(after)
    changed.chmod(0o755)
    assert subprocess.run([changed], check=False).returncode == 7


@needs_compiler
def test_what_has_no_filling_or_no_room_is_left_as_it_is(tmp_path: Path) -> None:
    once = without_padding(program(tmp_path))
    assert without_padding(once) == once
    command = ["gcc", "-nostdlib", "-static", "-Wl,-z,noseparate-code", "-o", "z", "x.s"]
    subprocess.run(command, cwd=tmp_path, check=True)
    usual = (tmp_path / "z").read_bytes()  # its headers are in its first segment
    assert b"\xcc" * 200_000 in usual
    assert without_padding(usual) == usual


@needs_compiler
def test_filling_that_ends_with_its_segment(tmp_path: Path) -> None:
    text = f".globl _start\n_start: nop\n.fill {(1 << 20) - 1}, 1, 0xcc\n"
    after = without_padding(program(tmp_path, text))
    assert loads(after)[0] == (5, 0x400000, 4096, 4096)
    assert len(loads(after)) == 2


def test_other_files_are_refused() -> None:
    with pytest.raises(ValueError, match="64-bit ELF"):
        without_padding(b"MZ" + bytes(200))
