# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from guestbuild import debian_kernel, kernel
from guestbuild.errors import BuildError

FOLDER = Path(__file__).resolve().parent.parent / "kernel"


def test_configuration_lines() -> None:
    text = [
        "# a comment",
        "CONFIG_A=y",
        "# CONFIG_B is not set",
        'CONFIG_C="x=y"',
        "",
        "CONFIG_D=7",
    ]
    assert kernel.parse_config(text) == {
        "CONFIG_A": "y",
        "CONFIG_B": "n",
        "CONFIG_C": '"x=y"',
        "CONFIG_D": "7",
    }


def test_later_fragments_win(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("CONFIG_A=y\nCONFIG_B=y\n")
    (tmp_path / "2").write_text("CONFIG_A=n\n")
    assert kernel.merge([tmp_path / "1", tmp_path / "2"]) == {"CONFIG_A": "n", "CONFIG_B": "y"}


def test_options_without_effect_are_told() -> None:
    actual = {"CONFIG_A": "y", "CONFIG_B": "n"}
    assert kernel.unmet({"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_X": "n"}, actual) == []
    assert kernel.unmet({"CONFIG_B": "y", "CONFIG_Y": "y"}, actual) == [
        "CONFIG_B=y (is n)",
        "CONFIG_Y=y (is n)",
    ]


def test_shipped_fragments_name_an_option_once() -> None:
    seen: dict[str, str] = {}
    for fragment in sorted(FOLDER.glob("*.config")):
        for name in kernel.parse_config(fragment.read_text().splitlines()):
            assert name not in seen, f"{name}: in {seen[name]} and {fragment.name}"
            seen[name] = fragment.name
        for line in fragment.read_text().splitlines():
            assert line.startswith(("CONFIG_", "#")) or not line.strip(), f"{fragment.name}: {line}"
    assert "CONFIG_PVH" in seen


def test_modules_load_after_what_they_need() -> None:
    needs = {"a": ["b", "c"], "b": ["c"], "c": [], "d_e": ["b"]}
    assert debian_kernel.load_order(["a", "d-e", "c"], needs.__getitem__) == ["c", "b", "a", "d_e"]
    with pytest.raises(KeyError):
        debian_kernel.load_order(["missing"], needs.__getitem__)


def test_patches_change_the_source_or_fail_by_name(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.c").write_text("one\ntwo\nthree\n")
    patch = tmp_path / "two.patch"
    patch.write_text("--- a/a.c\n+++ b/a.c\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n")
    kernel.apply_patch(patch, tree)
    assert (tree / "a.c").read_text() == "one\n2\nthree\n"
    with pytest.raises(BuildError, match=r"two\.patch does not fit this kernel's source"):
        kernel.apply_patch(patch, tree)
    assert (tree / "a.c").read_text() == "one\n2\nthree\n"


def test_shipped_patches_say_what_they_are_for() -> None:
    for patch in (FOLDER / "patches").iterdir():
        text, mark, _ = patch.read_text().partition("\ndiff --git ")
        assert patch.suffix == ".patch" and mark, patch.name
        assert text.startswith("SPDX-License-Identifier: GPL-2.0-only\n"), patch.name
        assert len(text.split()) > 30, patch.name
