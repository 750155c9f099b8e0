# SPDX-License-Identifier: Apache-2.0
"""Prometheus' text format: written, read strictly, and merged.

A page that Prometheus refuses loses the figures of the whole host, so what comes from a guest
is read into families first; a line that is not of the format, or a series that is there
already, goes no further.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from shimv2.metrics.durations import Durations

KINDS = ("counter", "gauge", "histogram", "summary", "untyped")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_FLOAT = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?|[+-]?Inf|NaN"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL}(?:,{_LABEL})*)?),?\}})? ({_FLOAT})")
_LABEL_NAMES = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(rf"# (HELP|TYPE) ({_NAME}) ?(.*)")
_LINE_LIMIT = 4096  # characters
_HELP_LIMIT = 160

#: One series' value: full name (a histogram's has a suffix), labels as they are written, value.
Sample = tuple[str, str, str]


@dataclass(slots=True)
class Family:
    """The samples of one name."""

    name: str
    kind: str = "untyped"
    help: str = ""
    samples: list[Sample] = field(default_factory=list)
    series: set[tuple[str, str]] = field(default_factory=set)

    def add(self, name: str, labels: str, value: str) -> None:
        """One sample; of a series that is there already the first stays."""
        if (name, labels) not in self.series:
            self.series.add((name, labels))
            self.samples.append((name, labels, value))


class Page:
    """Families in the order they came."""

    def __init__(self) -> None:
        self.families: dict[str, Family] = {}

    def family(self, name: str, help_: str, kind: str = "gauge") -> Family:
        """That family, made if it is not there yet."""
        found = self.families.get(name)
        if found is None:
            found = self.families[name] = Family(name, kind, help_)
        return found

    def add(
        self,
        name: str,
        help_: str,
        samples: Iterable[tuple[Mapping[str, str], float]],
        kind: str = "gauge",
    ) -> None:
        """Samples with their labels; without any the family is left out."""
        for labels, value in samples:
            self.family(name, help_, kind).add(name, render(labels), number(value))

    def value(self, name: str, help_: str, value: float, kind: str = "gauge") -> None:
        """A family of one sample without labels."""
        self.add(name, help_, [({}, value)], kind)

    def items(self, name: str, help_: str, values: Mapping[str, float]) -> None:
        """A family by its label ``item``, as most of Kata's are."""
        self.add(name, help_, [({"item": item}, value) for item, value in values.items()])

    def histogram(
        self, name: str, help_: str, durations: Durations, labels: tuple[str, ...] = ("action",)
    ) -> None:
        """What was counted; `labels` are the names of the parts of each key."""
        for key, counts in durations.counts.items():
            family = self.family(name, help_, "histogram")
            own = dict(zip(labels, key, strict=True))
            total = 0
            bounds = (*map(str, durations.buckets), "+Inf")
            for bound, count in zip(bounds, counts, strict=True):
                total += count
                family.add(f"{name}_bucket", render({**own, "le": bound}), str(total))
            family.add(f"{name}_sum", render(own), number(durations.sums[key]))
            family.add(f"{name}_count", render(own), str(total))

    def merge(self, other: Page, labels: Mapping[str, str]) -> None:
        """Add another's samples, `labels` in front of their own; a family that is of another
        kind there is left out."""
        front = render(labels)
        for name, theirs in other.families.items():
            ours = self.family(name, theirs.help, theirs.kind)
            if ours.kind != theirs.kind:
                continue
            for sample, own, value in theirs.samples:
                ours.add(sample, f"{front},{own}" if front and own else front or own, value)

    def __str__(self) -> str:
        lines: list[str] = []
        for family in self.families.values():
            if not family.samples:
                continue
            if family.help:
                lines.append(f"# HELP {family.name} {family.help}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            lines += [
                f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"
                for name, labels, value in family.samples
            ]
        return "\n".join([*lines, ""])


def parse(
    text: str,
    *,
    samples: int,
    rename: Callable[[str], str | None] = lambda name: name,
    kind_of: Callable[[str], str] | None = None,
    reserved: frozenset[str] = frozenset(),
) -> Page:
    """Read a page of somebody else's; what is not of the format is left out.

    Args:
        samples: so many are read at most.
        rename: a family's name here; None leaves it out.
        kind_of: the kind of a name, whatever the page says; none has suffixes then.
        reserved: labels that nobody but us may set.
    """
    page = Page()
    kinds: dict[str, str] = {}
    helps: dict[str, str] = {}
    places: dict[str, tuple[Family, str] | None] = {}  # by the names of samples
    left = samples
    for line in text.split("\n"):
        if len(line) > _LINE_LIMIT:
            continue
        if line.startswith("#"):
            comment = _COMMENT.fullmatch(line)
            if comment is None:
                continue
            if comment[1] == "TYPE" and comment[3] in KINDS and kind_of is None:
                kinds.setdefault(comment[2], comment[3])
            elif comment[1] == "HELP":
                helps.setdefault(comment[2], _printable(comment[3]))
            continue
        found = _SAMPLE.fullmatch(line)
        if found is None:
            continue
        if not left:
            break
        left -= 1
        name, labels, value = found.groups("")
        if name not in places:
            base = _family_of(name, kinds)
            ours = rename(base)
            if ours is None:
                places[name] = None
            else:
                kind = kind_of(ours) if kind_of else kinds.get(base, "untyped")
                family = page.family(ours, helps.get(base, ""), kind)
                places[name] = family, ours + name[len(base) :]
        place = places[name]
        if place is None:
            continue
        if labels:
            names = _LABEL_NAMES.findall(labels)
            if len(set(names)) < len(names) or not reserved.isdisjoint(names):
                continue
        place[0].add(place[1], labels, value)
    return page


def _family_of(name: str, kinds: Mapping[str, str]) -> str:
    if name not in kinds:
        for kind, suffixes in _SUFFIXES.items():
            for suffix in suffixes:
                if name.endswith(suffix) and kinds.get(name[: -len(suffix)]) == kind:
                    return name[: -len(suffix)]
    return name


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() and c != "\\" else " " for c in text[:_HELP_LIMIT])


def render(labels: Mapping[str, str]) -> str:
    """Labels as they are written between braces."""
    return ",".join(f'{name}="{escape(value)}"' for name, value in labels.items())


def escape(value: str) -> str:
    """A label's value as it is written between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number(value: float) -> str:
    """A value as Prometheus reads it; whole ones without a point."""
    if isinstance(value, int):
        return str(value)
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(round(value, 6))
