# SPDX-License-Identifier: Apache-2.0
"""A program that executes another one with given words: what a script's first line can't do.

`#!` has room for one word before the script's own name, and Python would compile that script. The
program is an ELF file of one page for x86-64, so that a build needs no compiler: System V ABI,
"Process Initialization"; system calls by number (asm/unistd_64.h).
"""

from __future__ import annotations

import struct

_BASE = 0x400000
_HEADERS = struct.Struct("<16sHHIQQQIHHHHHH IIQQQQQQ IIQQQQQQ")
_CODE = struct.Struct("<4s5s3sI cI cI 5s2s 5s5s2s")
_EXECVE, _EXIT = 59, 60
_FAILED = 127  # the status of a shell whose program could not be executed


def program(path: str, words: list[str], variable: str) -> bytes:
    """An executable that becomes `path` with these words, its own environment and one variable.

    Args:
        words: argv, the program's own name first.
        variable: NAME=VALUE, the first of the environment.
    """
    strings = [text.encode() + b"\0" for text in (path, variable, *words)]
    table = _BASE + _HEADERS.size + _CODE.size
    place = table + 8 * (len(words) + 1)
    places = []
    for text in strings:
        places.append(place)
        place += len(text)
    size = place - _BASE
    # At the start the stack has argc, argv, 0, the environment, 0. The 0 after argv gives its
    # place to the variable, and the environment begins there.
    code = _CODE.pack(
        *(b"\x48\x8b\x0c\x24", b"\x48\x8d\x54\xcc\x08"),  # rcx = argc; rdx = &argv[argc]
        *(b"\x48\xc7\x02", places[1]),  # *rdx = variable
        *(b"\xbf", places[0], b"\xbe", table),  # edi = path; esi = argv
        *(_eax(_EXECVE), _SYSCALL),
        *(b"\xbf" + struct.pack("<I", _FAILED), _eax(_EXIT), _SYSCALL),
    )
    argv = struct.pack(f"<{len(words) + 1}Q", *places[2:], 0)
    return _headers(size) + code + argv + b"".join(strings)


_SYSCALL = b"\x0f\x05"


def _eax(number: int) -> bytes:
    return b"\xb8" + struct.pack("<I", number)


def _headers(size: int) -> bytes:
    identity = b"\x7fELF\x02\x01\x01"
    executable, x86_64, version, header, entry_size = 2, 62, 1, 64, 56
    load, stack, read, write, execute = 1, 0x6474E551, 4, 2, 1
    return _HEADERS.pack(
        *(identity, executable, x86_64, version, _BASE + _HEADERS.size, header, 0),
        *(0, header, entry_size, 2, 0, 0, 0),
        *(load, read | execute, 0, _BASE, _BASE, size, size, 0x1000),
        *(stack, read | write, 0, 0, 0, 0, 0, 16),  # whose pages are not executable
    )
