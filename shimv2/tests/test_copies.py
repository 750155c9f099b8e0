# SPDX-License-Identifier: Apache-2.0
"""What reaches a guest with which nothing is shared."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from shimv2 import copies
from shimv2.copies import Copies
from shimv2.share import GUEST_DIR, ShareError


class Guest:
    """Attributes: files: path → (type, mode, content), as CopyFile would make them."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int, bytes]] = {}
        self.pieces = 0

    async def call(self, method: str, request: Any) -> None:
        assert method == "CopyFile"
        self.pieces += 1
        before = self.files[request.path][2] if request.offset else b""
        assert len(before) == request.offset
        mode = request.file_mode
        content = before + request.data
        self.files[request.path] = (stat.S_IFMT(mode), stat.S_IMODE(mode), content)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub/file").write_text("text")
    (directory / "empty").touch(mode=0o600)
    (directory / "link").symlink_to("sub/file")
    (directory / "loop").symlink_to(".")
    os.mkfifo(directory / "fifo")
    return directory


async def test_a_directory_with_all_in_it(source: Path) -> None:
    guest, share = Guest(), Copies()
    where = share.add_mount("web", str(source), "/data", readonly=True)
    assert where.parent == GUEST_DIR
    await share.send(guest.call)
    found = {path.removeprefix(str(where)): entry for path, entry in guest.files.items()}
    assert next(iter(found)) == "", "a directory comes before what is in it"
    assert {path: (kind, content) for path, (kind, _, content) in found.items()} == {
        "": (stat.S_IFDIR, b""),
        "/sub": (stat.S_IFDIR, b""),
        "/sub/file": (stat.S_IFREG, b"text"),
        "/empty": (stat.S_IFREG, b""),
        "/link": (stat.S_IFLNK, b"sub/file"),
        "/loop": (stat.S_IFLNK, b"."),
    }
    assert found["/empty"][1] == 0o600
    pieces = guest.pieces
    await share.send(guest.call)
    assert guest.pieces == pieces, "once"


async def test_a_large_file_goes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_PIECE", 1000)
    file = tmp_path / "file"
    content = os.urandom(2500)
    file.write_bytes(content)
    guest, share = Guest(), Copies()
    where = share.add_mount("web", str(file), "/file")
    await share.send(guest.call)
    assert guest.files[str(where)][2] == content
    assert guest.pieces == 3


async def test_too_much_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_MOST_ENTRIES", 3), ("_MOST_BYTES", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(copies, name, value)
            share = Copies()
            share.add_mount("web", str(source), "/data")
            with pytest.raises(ShareError, match=str(source)):
                await share.send(Guest().call)


def test_what_can_not_be_copied(tmp_path: Path) -> None:
    with pytest.raises(ShareError, match="nosuch"):
        Copies().add_mount("web", str(tmp_path / "nosuch"), "/x")
    with pytest.raises(ShareError, match="shared_fs"):
        Copies().add_rootfs("web", tmp_path)
