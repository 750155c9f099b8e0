# SPDX-License-Identifier: Apache-2.0
"""`kata-runtime direct-volume` without a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shimv2 import direct_volumes
from shimv2.runtime_cli import cli, direct_volume, management

INFO = json.dumps({"volume-type": "block", "device": "/dev/sdf", "fstype": "xfs"})


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What reached a shim."""
    found: list[tuple[object, ...]] = []

    def ask(*words: object) -> bytes:
        found.append(words)
        return b'{"usage": []}'

    monkeypatch.setattr(direct_volumes, "DIRECTORY", tmp_path / "direct")
    monkeypatch.setattr(direct_volume, "sandbox_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(management, "ask", ask)
    return found


def run(action: str, *more: str, path: str = "/a volume") -> int:
    return cli.main(["direct-volume", action, "--volume-path", path, *more])


def test_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("add", "--mount-info", INFO) == 0
    volume = direct_volumes.find("/a volume")
    assert volume is not None
    assert volume.fstype == "xfs"
    assert run("remove") == 0
    assert direct_volumes.find("/a volume") is None
    assert run("add", "--mount-info", "{}") == 1
    assert "volume-type" in capsys.readouterr().err


def test_who_uses_it_is_asked(
    asked: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("stats") == 1
    assert "/a volume is not a direct volume" in capsys.readouterr().err
    run("add", "--mount-info", INFO)
    assert run("stats") == 1
    assert "no sandbox uses /a volume" in capsys.readouterr().err
    direct_volumes.claim("/a volume", "pod0")  # which is gone
    direct_volumes.claim("/a volume", "pod1")
    (tmp_path / "pod1").mkdir()
    assert run("stats") == 0
    assert json.loads(capsys.readouterr().out) == {"usage": []}
    assert run("resize", "--size", "4096") == 0
    stats, resize = asked
    assert stats == ("pod1", "GET", "/direct-volume/stats?path=%2Fa%20volume")
    body = resize[3]
    assert isinstance(body, bytes)
    assert json.loads(body) == {"VolumePath": "/a volume", "Size": 4096}


@pytest.mark.parametrize("size", ["0", "-1", "1G", ""])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run("resize", "--size", size)
    assert caught.value.code == 2
