# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from guestbuild import elf

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def library(tmp_path: Path, source: str) -> bytes:
    (tmp_path / "x.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-o", "x.so", "x.c", "-Wl,--no-as-needed", "-lm", "-lc"]
    subprocess.run(command, cwd=tmp_path, check=True)
    return (tmp_path / "x.so").read_bytes()


@needs_compiler
def test_an_unused_library_is_dropped_and_the_rest_works(tmp_path: Path) -> None:
    data = library(tmp_path, "#include <stdlib.h>\nint size(void) { return abs(-7); }\n")
    assert elf.needed(data) == ["libm.so.6", "libc.so.6"]
    dropped = elf.drop_needed(data, "libm.so.6")
    assert elf.needed(dropped) == ["libc.so.6"]
    assert len(dropped) == len(data)
    (tmp_path / "y.so").write_bytes(dropped)
    assert ctypes.CDLL(str(tmp_path / "y.so")).size() == 7


@needs_compiler
def test_a_library_in_use_stays(tmp_path: Path) -> None:
    data = library(tmp_path, "#include <math.h>\ndouble f(double x) { return pow(x, x); }\n")
    with pytest.raises(ValueError, match=r"symbols of libm.so.6 are used"):
        elf.drop_needed(data, "libm.so.6")
    with pytest.raises(ValueError, match="not asked for"):
        elf.drop_needed(data, "libz.so.1")


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x01\x01" + bytes(100), bytes(200)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="ELF"):
        elf.needed(data)
