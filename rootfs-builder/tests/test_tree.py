# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from guestbuild import tree
from guestbuild.errors import BuildError


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in tree.walk(root) if not path.is_dir()]


def test_prune_takes_folders_whole_and_wildcards_cross_slashes(tmp_path: Path) -> None:
    make(tmp_path, "usr/share/doc/a/b", "usr/lib/x.a", "usr/lib/y/z.a", "usr/lib/y/z.so")
    assert tree.prune(tmp_path, ["/usr/share/*", "/usr/*.a"], []) == 3
    assert names(tmp_path) == ["usr/lib/y/z.so"]
    assert (tmp_path / "usr/share").is_dir()


def test_prune_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    make(tmp_path, "usr/share/zoneinfo/UTC", "usr/share/zoneinfo/Asia/Tokyo", "usr/share/doc/x")
    tree.prune(tmp_path, ["/usr/share"], ["/usr/share/zone*/UTC"])
    assert names(tmp_path) == ["usr/share/zoneinfo/UTC"]


def test_prune_does_not_follow_links(tmp_path: Path) -> None:
    make(tmp_path, "outside/file")
    root = tmp_path / "root"
    make(root, "lib/file")
    (root / "gone").symlink_to("../outside")
    assert tree.prune(root, ["/gone*"], []) == 1
    assert (tmp_path / "outside/file").exists()


def test_paths_stay_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/sbin").mkdir(parents=True)
    (root / "sbin").symlink_to("usr/sbin")
    (root / "abs").symlink_to("/usr")
    (root / "up").symlink_to("../../../..")
    (root / "loop").symlink_to("loop")
    assert tree.inside(root, "/sbin/init") == root / "usr/sbin/init"
    assert tree.inside(root, "/abs/x") == root / "usr/x"
    assert tree.inside(root, "/up/etc/passwd") == root / "etc/passwd"
    with pytest.raises(BuildError, match="symbolic links"):
        tree.inside(root, "/loop/x")


def test_linked_copy_shares_files(tmp_path: Path) -> None:
    make(tmp_path / "base", "a/b")
    (tmp_path / "base/link").symlink_to("a/b")
    tree.copy_linked(tmp_path / "base", tmp_path / "copy")
    assert (tmp_path / "copy/a/b").samefile(tmp_path / "base/a/b")
    assert (tmp_path / "copy/link").is_symlink()
