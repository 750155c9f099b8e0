# SPDX-License-Identifier: Apache-2.0
"""Operations on a folder that is going to be the guest's root."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from guestbuild.errors import BuildError


def walk(root: Path) -> Iterator[Path]:
    """Everything below a folder, parents first, in the order of their names."""
    for entry in sorted(root.iterdir()):
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from walk(entry)


def inside(root: Path, guest_path: str) -> Path:
    """Where a guest's path lies on the host; symlinks in its folders are the guest's.

    Raises:
        BuildError: Too many symlinks.
    """
    parts = [part for part in guest_path.split("/") if part]
    current = root
    budget = 40
    while parts:
        part = parts.pop(0)
        if part == "..":
            current = current.parent if current != root else root
            continue
        step = current / part
        if step.is_symlink() and parts:
            budget -= 1
            if not budget:
                raise BuildError(f"{guest_path}: too many symbolic links in the guest")
            target = os.readlink(step)
            if target.startswith("/"):
                current = root
            parts[:0] = [piece for piece in target.split("/") if piece not in ("", ".")]
            continue
        current = step
    return current


def prune(root: Path, remove: Sequence[str], keep: Sequence[str]) -> int:
    """Delete what matches a pattern of `remove` and none of `keep`; returns how many files.

    Patterns are absolute paths in the guest with shell wildcards; `*` also matches `/`. A folder
    that matches goes with all that is in it, except for what is kept.
    """
    paths = list(walk(root))
    kept: set[Path] = set()
    for path in _matching(root, paths, keep):
        kept.add(path)
        kept.update(path.parents)
        if path.is_dir() and not path.is_symlink():
            kept.update(walk(path))
    removed = 0
    doomed = set(_matching(root, paths, remove))
    for path in paths:
        if path.parent in doomed:
            doomed.add(path)
    for path in reversed(paths):
        if path in doomed and path not in kept:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
                removed += 1
    return removed


def _matching(root: Path, paths: Sequence[Path], patterns: Sequence[str]) -> Iterator[Path]:
    if not patterns:
        return
    expression = re.compile("|".join(f"(?:{fnmatch.translate(pattern)})" for pattern in patterns))
    for path in paths:
        if expression.match("/" + str(path.relative_to(root))):
            yield path


def copy_linked(source: Path, target: Path) -> None:
    """Copy a tree with its files as hard links: quick, and read-only by agreement."""
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    for path in [source, *walk(source)]:
        if path.is_dir() and not path.is_symlink():
            status = path.stat()
            os.chown(target / path.relative_to(source), status.st_uid, status.st_gid)


def size(root: Path) -> int:
    """Sum of the files' bytes."""
    return sum(path.lstat().st_size for path in walk(root) if not path.is_dir())
