# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import copyfile
from agent.api import agent_pb2
from ttrpc.errors import Code, RpcError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def _copy(root: Path, path: str, **fields: Any) -> None:
    defaults = {"file_mode": stat.S_IFREG | 0o640, "uid": os.getuid(), "gid": os.getgid()}
    request = agent_pb2.CopyFileRequest(path=f"{root}/{path}", **{**defaults, **fields})
    copyfile.copy_file(request, str(root))


def test_file_in_pieces(root: Path) -> None:
    data = os.urandom(300_000)
    for offset in range(0, len(data), 100_000):
        _copy(
            root,
            "c1/dir/file",
            file_size=len(data),
            offset=offset,
            data=data[offset : offset + 100_000],
            dir_mode=0o711,
        )
        assert (root / "c1/dir/file").exists() is (offset == 200_000)
    assert (root / "c1/dir/file").read_bytes() == data
    assert stat.S_IMODE((root / "c1/dir/file").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "c1").stat().st_mode) == 0o711
    assert os.listdir(root / "c1/dir") == ["file"]


def test_resumed_piece_and_replaced_file(root: Path) -> None:
    _copy(root, "f", file_size=3, data=b"old")
    _copy(root, "f", file_size=6, data=b"abcd")
    _copy(root, "f", file_size=6, offset=2, data=b"CD")  # sent again after a lost answer
    assert (root / "f").read_bytes() == b"old"
    _copy(root, "f", file_size=6, offset=4, data=b"ef")
    assert (root / "f").read_bytes() == b"abCDef"


def test_empty_file_directory_and_link(root: Path) -> None:
    _copy(root, "empty", file_size=0)
    assert (root / "empty").read_bytes() == b""
    for _ in range(2):
        _copy(root, "d/e", file_mode=stat.S_IFDIR | 0o2750)
        _copy(root, "d/link", file_mode=stat.S_IFLNK | 0o777, data=b"../../outside")
    assert stat.S_IMODE((root / "d/e").stat().st_mode) == 0o2750
    assert os.readlink(root / "d/link") == "../../outside"


def test_owner(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    _copy(root, "a/f", file_size=1, data=b"x", uid=1001, gid=1002)
    for path in (root / "a", root / "a/f"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1001, 1002)


@pytest.mark.parametrize("path", ["", "..", "../x", "a/../../x", "a/..", "."])
def test_paths_that_lead_out(root: Path, path: str) -> None:
    with pytest.raises(RpcError) as caught:
        _copy(root, path, data=b"x", file_size=1)
    assert caught.value.code == Code.INVALID_ARGUMENT


def test_path_elsewhere(root: Path) -> None:
    for path in ("/etc/passwd", f"{root}-other/x", str(root)):
        with pytest.raises(RpcError) as caught:
            copyfile.copy_file(agent_pb2.CopyFileRequest(path=path), str(root))
        assert caught.value.code == Code.INVALID_ARGUMENT


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("untouched")
    _copy(root, "link", file_mode=stat.S_IFLNK, data=str(outside).encode())
    with pytest.raises(RpcError) as caught:
        _copy(root, "link/f", data=b"x", file_size=1)
    assert caught.value.code == Code.INTERNAL
    with pytest.raises(RpcError):
        _copy(root, "link", file_mode=stat.S_IFDIR | 0o777)
    _copy(root, "g.tmp", file_mode=stat.S_IFLNK, data=f"{outside}/f".encode())
    with pytest.raises(RpcError):  # a later piece must not be written through the link
        _copy(root, "g", data=b"x", file_size=2, offset=1)
    _copy(root, "g", data=b"x", file_size=1)
    assert (outside / "f").read_text() == "untouched"
    assert sorted(os.listdir(outside)) == ["f"]
    _copy(root, "link", data=b"now a file", file_size=10)
    assert (root / "link").read_bytes() == b"now a file"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"file_size": 3, "data": b"four"}, Code.INVALID_ARGUMENT),
        ({"file_size": 3, "offset": -1}, Code.INVALID_ARGUMENT),
        ({"file_size": -1}, Code.INVALID_ARGUMENT),
        ({"file_size": 9, "offset": 4, "data": b"x"}, Code.FAILED_PRECONDITION),
        ({"file_mode": stat.S_IFIFO | 0o600}, Code.INVALID_ARGUMENT),
        ({"file_mode": stat.S_IFLNK}, Code.INVALID_ARGUMENT),
        ({"uid": -5}, Code.INVALID_ARGUMENT),
    ],
)
def test_bad_requests(root: Path, fields: dict[str, Any], code: Code) -> None:
    with pytest.raises(RpcError) as caught:
        _copy(root, "f", **fields)
    assert caught.value.code == code
    assert not (root / "f").exists()


def test_gap(root: Path) -> None:
    _copy(root, "f", file_size=9, data=b"ab")
    with pytest.raises(RpcError) as caught:
        _copy(root, "f", file_size=9, offset=3, data=b"d")
    assert caught.value.code == Code.FAILED_PRECONDITION


@given(st.text(alphabet="/.ab\0", max_size=12))
def test_no_path_leads_out(path: str) -> None:
    try:
        parts = copyfile._relative_parts("/r" + path, "/r")
    except RpcError:
        return
    assert parts
    assert not {"", ".", ".."} & set(parts)
