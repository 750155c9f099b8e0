# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm.qemu.memory import copy_sparse, save_sparse

PAGE = 4096


@pytest.mark.parametrize("copy", [copy_sparse, save_sparse])
def test_copies_are_equal(tmp_path: Path, copy: object) -> None:
    original = tmp_path / "original"
    with original.open("wb") as file:
        file.truncate(8 << 20)
        for position, data in (
            (PAGE, b"x" * PAGE),
            (3 * PAGE, bytes(PAGE) + b"y" * 10),
            ((1 << 20) - 5, os.urandom(3 * PAGE)),
            (5 << 20, bytes(2 << 20)),
            ((8 << 20) - 1, b"z"),
        ):
            file.seek(position)
            file.write(data)
    target = tmp_path / "copy"
    with original.open("rb") as source, target.open("wb") as sink:
        copy(source.fileno(), sink.fileno())  # type: ignore[operator]
    assert target.read_bytes() == original.read_bytes()
    if copy is save_sparse:
        assert target.stat().st_blocks * 512 <= 8 * PAGE, "zeros are holes"
