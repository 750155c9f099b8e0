# SPDX-License-Identifier: Apache-2.0
"""Mounts in the forms of containerd's mount manager (2.2 and later), which `-info` asks for.

A type may have prefixes, ``format/mkdir/overlay``: ``format`` says that source and options hold
templates over the mounts before it in the list, ``mkdir`` that options name directories to be
made first.  containerd, core/mount/manager: format.go, mkdir.go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PREFIX = "X-containerd."
_MKDIR = f"{PREFIX}mkdir.path="
_TRANSFORMS = ("format", "mkdir")
_DEFAULT_MODE = 0o700
_TEMPLATE = re.compile(r"\{\{\s*(source|target|mount|overlay)\s+(\d+)(?:\s+(\d+))?\s*\}\}")


class MountSpec(Protocol):
    """containerd.types.Mount, as it comes with CreateTask."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A mount that is there: what it was made from, and where it lies."""

    source: str
    target: str
    point: str


@dataclass(frozen=True, slots=True)
class Plain:
    """A mount without prefixes and templates; a `MountSpec`.

    Attributes:
        directories: (path, mode) to be made before it.
    """

    type: str
    source: str
    target: str
    options: list[str]
    directories: list[tuple[str, int]]


def is_transformed(spec: MountSpec) -> bool:
    """Whether it needs `plain` before it can be mounted."""
    return "/" in spec.type


def plain(spec: MountSpec, made: Sequence[Made]) -> Plain:
    """Apply the prefixes of a mount's type.

    Raises:
        ValueError: one that is not known here, or a template that makes no sense.
    """
    *prefixes, fstype = spec.type.split("/")
    source, target, options = spec.source, spec.target, list(spec.options)
    directories: list[tuple[str, int]] = []
    for prefix in prefixes:
        if prefix not in _TRANSFORMS:
            raise ValueError(f"type {spec.type!r}: {prefix!r} is not known")
        if prefix == "format":
            source, target = _expand(source, made), _expand(target, made)
            options = [_expand(option, made) for option in options]
        else:
            directories += [_directory(o) for o in options if o.startswith(_MKDIR)]
            options = [option for option in options if not option.startswith(_MKDIR)]
    return Plain(fstype, source, target, options, directories)


def _expand(text: str, made: Sequence[Made]) -> str:
    def replace(match: re.Match[str]) -> str:
        word, first, last = match[1], int(match[2]), match[3]
        if (word == "overlay") != (last is not None):
            raise ValueError(f"template {match[0]!r}: wrong number of arguments")
        numbers = [first]
        if last is not None:
            end = int(last)
            numbers = list(range(first, end + 1) if first <= end else range(first, end - 1, -1))
        if max(numbers) >= len(made):
            raise ValueError(f"template {match[0]!r}: there are {len(made)} mounts before it")
        name = {"source": "source", "target": "target"}.get(word, "point")
        return ":".join(getattr(made[number], name) for number in numbers)

    expanded = _TEMPLATE.sub(replace, text)
    if "{{" in expanded:
        raise ValueError(f"template in {text!r} is not known")
    return expanded


def _directory(option: str) -> tuple[str, int]:
    # PATH[:MODE[:UID:GID]]; containerd itself takes no owner but its own.
    path, _, rest = option.removeprefix(_MKDIR).partition(":")
    mode, _, owner = rest.partition(":")
    if owner not in ("", "0:0"):
        raise ValueError(f"option {option!r}: owners other than root are not supported")
    try:
        bits = int(mode, 8) if mode else _DEFAULT_MODE
    except ValueError:
        bits = -1
    if not path.startswith("/") or not 0 <= bits <= 0o777:
        raise ValueError(f"option {option!r} is not PATH[:MODE]")
    return path, bits
