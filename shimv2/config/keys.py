# SPDX-License-Identifier: Apache-2.0
"""What is known about one configuration key beside its name, type and default.

The sections (`hypervisor.py`, `agent.py`, `runtime.py`, `factory.py`) are frozen dataclasses;
each field carries a `Key` in its metadata.  Reading, checking, annotations, the sample
configuration.toml and the table in the documentation all work from these.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, dataclass_transform

T = TypeVar("T")

U32 = (1 << 32) - 1
U63 = (1 << 63) - 1
UNSET = Path()
"""Default of a path that `resolve` fills in with the installed one."""
SAME_NAME = "="
"""An annotation whose base name is that of the key."""


class Support(enum.Enum):
    """What happens when a key is given a value other than its default."""

    YES = "yes"
    INERT = "no effect"  # accepted in silence: nothing a user could miss
    NO = "not supported"  # ignored with a warning
    REFUSED = "refused"  # an error: leaving it out would weaken what was asked for


@dataclass(frozen=True, slots=True)
class Key:
    """Facts about one key.

    Args:
        doc: one line for the reference table and the sample file.
        unit: of a number.
        low, high: inclusive bounds of a number.
        choices: allowed texts; empty means any.
        foreign: texts that Kata allows and this runtime does not.
        synonyms: other spellings of a choice, as Kata's runtimes write them.
        aliases: other names of the key.
        annotation: base name of the annotation that overrides it, `SAME_NAME`, or "".
        separator: how an annotation's text becomes a list: a character, or "json".
        allowed_by: the key with the globs that an annotation's path must match.
        vmms: which VMMs read it: Q(EMU), C(loud Hypervisor), F(irecracker), R(emote).
        support: see `Support`.
        own: a key that Kata doesn't have.
        sample: whether the sample configuration.toml shows it.
    """

    doc: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    annotation: str = ""
    separator: str = ""
    allowed_by: str = ""
    vmms: str = "QCF"
    support: Support = Support.YES
    own: bool = False
    sample: bool = False


def key(default: T, doc: str, **facts: Any) -> T:
    """A dataclass field with a default and the facts of `Key`."""
    made: T = field(default=default, metadata={"key": Key(doc, **facts)})
    return made


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
    """Base of the sections: subclasses are frozen dataclasses.

    One generic constructor in place of a generated one of a hundred parameters: compiling
    those took 6 ms of a sandbox's start.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, init=False, repr=False, eq=False)(cls)

    def __init__(self, **values: Any) -> None:
        known = self.__dataclass_fields__
        if not known.keys() >= values.keys():
            names = ", ".join(sorted(values.keys() - known.keys()))
            raise TypeError(f"{type(self).__name__} has no {names}")
        self.__dict__.update({name: item.default for name, item in known.items()} | values)

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # some values are tables

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


def keys_of(section: type[Section]) -> Iterator[tuple[Field[Any], Key]]:
    """The fields of a section that are keys of a configuration file."""
    for item in section.__dataclass_fields__.values():
        known = item.metadata.get("key")
        if known is not None:
            yield item, known


def annotation_name(item: Field[Any], known: Key) -> str:
    """Base name of the annotation that overrides a key; "" if there is none."""
    return item.name if known.annotation == SAME_NAME else known.annotation
