# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from guestbuild import description
from guestbuild.errors import BuildError

FOLDER = Path(__file__).resolve().parent.parent
MINIMAL = "packages: [crun]\nagent: {path: .}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "guest.yaml"
    path.write_text(text)
    return path


def failure(tmp_path: Path, text: str) -> str:
    with pytest.raises(BuildError) as caught:
        description.load(write(tmp_path, text))
    return str(caught.value)


def test_the_shipped_description_loads() -> None:
    guest = description.load(FOLDER / "guest.yaml")
    assert guest.suite == "trixie"
    assert guest.agent.entry == "agent.main:main"
    assert guest.agent.path == FOLDER.parent
    assert len(guest.kernel.fragments) == len(list((FOLDER / "kernel").glob("*.config"))) > 0
    assert len(guest.kernel.patches) == len(list((FOLDER / "kernel/patches").iterdir())) > 0
    assert all("--hash=sha256:" in wheel for wheel in guest.wheels)


def test_static_programs_are_pinned() -> None:
    (crun,) = description.load(FOLDER / "guest.yaml").static
    assert crun.name == "crun"
    assert {crun.source, crun.sha256} <= set(map(str, crun.as_list()))
    assert "-all-static" in " ".join(crun.make)


def test_defaults(tmp_path: Path) -> None:
    guest = description.load(write(tmp_path, MINIMAL))
    assert guest.packages == ("crun",)
    assert guest.image.compression == "none"
    assert guest.mirror is None
    assert guest.agent.packages == ("agent", "ttrpc")


def test_relative_paths_start_at_the_description(tmp_path: Path) -> None:
    (tmp_path / "motd").write_text("hello")
    (tmp_path / "a.config").write_text("CONFIG_A=y\n")
    guest = description.load(
        write(
            tmp_path,
            MINIMAL + "files: [{source: motd, target: /etc/motd, mode: '0640'}]\n"
            "kernel: {fragments: ['*.config']}\n",
        )
    )
    assert guest.files[0].source == tmp_path / "motd"
    assert guest.files[0].mode == 0o640
    assert guest.kernel.fragments == (tmp_path / "a.config",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("packges: [crun]\nagent: {path: .}", ["packges", "did you mean packages?"]),
        (MINIMAL + "image: {compresion: lz4}", ["image.compresion", "compression"]),
        ("agent: {path: .}", ["packages", "list"]),
        ("packages: crun\nagent: {path: .}", ["packages", "list"]),
        ("packages: [1]\nagent: {path: .}", ["packages", "text"]),
        ("packages: [crun]\nagent: {path: nowhere}", ["agent.path", "does not exist"]),
        ("packages: [crun]\nagent: {path: ., entry: main}", ["agent.entry", "MODULE:FUNCTION"]),
        (MINIMAL + "suite: 'x y'", ["suite"]),
        (MINIMAL + "static: [{source: a, sha256: 12}]", ["static.sha256", "text"]),
        (MINIMAL + "static: [{source: a, sha256: abc}]", ["static.sha256", "64 hex digits"]),
        (MINIMAL + "static: [{sauce: a}]", ["static.sauce", "did you mean source?"]),
        (MINIMAL + "remove: [usr/share]", ["remove", "absolute"]),
        (MINIMAL + "remove: [/usr/../etc]", ["remove", ".."]),
        (MINIMAL + "image: {compression: rar}", ["image.compression", "lz4"]),
        (MINIMAL + "files: [{source: ., target: /x, mode: rwx}]", ["files.mode", "octal"]),
        ("- a list", ["mapping"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    message = failure(tmp_path, text)
    assert str(tmp_path / "guest.yaml") in message
    for word in words:
        assert word in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="No such file"):
        description.load(tmp_path / "none.yaml")
