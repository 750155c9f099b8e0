# SPDX-License-Identifier: Apache-2.0
"""Digests of a step's inputs, by which its result is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

_LENGTH = 20  # hex digits kept in names of cache entries


def of_value(value: object) -> str:
    """Digest of anything JSON can hold (dicts in any order)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def of_file(path: Path) -> str:
    """The whole SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tree(files: Iterable[tuple[str, Path]]) -> str:
    """Digest of named files: their names, modes' execute bit and bytes."""
    state = hashlib.sha256()
    for name, path in sorted(files):
        executable = bool(path.stat().st_mode & 0o111)
        state.update(f"{name}\0{int(executable)}\0{of_file(path)}\n".encode())
    return state.hexdigest()[:_LENGTH]


def of_builder(*modules: str) -> str:
    """Digest of source files of this package: a changed builder doesn't reuse old results."""
    folder = Path(__file__).parent
    return of_tree((name, folder / f"{name}.py") for name in modules)
