# SPDX-License-Identifier: Apache-2.0
"""A figure: several measurements of one thing, and a table of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Figure:
    """Measurements of one thing by one runtime.

    Attributes:
        unit: "s", "ms", "MB/s", "MB" or "calls/s".
        goal: what it is held against, as text; "" for none.
    """

    name: str
    runtime: str
    unit: str
    goal: str = ""
    values: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Of rates the largest, of times and sizes the smallest."""
        return max(self.values) if self.unit.endswith("/s") else min(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def measure(self, times: int, once: Callable[[], float]) -> None:
        """Call `once` so many times; each answer is a value."""
        self.values += [once() for _ in range(times)]

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "best": self.best, "median": self.median}


def table(figures: list[Figure]) -> str:
    """A text table, a row a name, the runtimes side by side."""
    names = list(dict.fromkeys(figure.name for figure in figures))
    by_key = {(figure.name, figure.runtime): figure for figure in figures}
    rows = [("", "runc best", "median", "kata best", "median", "kata/runc", "goal")]
    for name in names:
        runc, kata = by_key.get((name, "runc")), by_key.get((name, "kata"))
        some = kata or runc
        assert some is not None
        ratio = f"{kata.median / runc.median:.2f}" if kata and runc and runc.median else ""
        rows.append((f"{name} [{some.unit}]", *_cells(runc), *_cells(kata), ratio, some.goal))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(figure: Figure | None) -> tuple[str, str]:
    if figure is None or not figure.values:
        return "", ""
    return _number(figure.best), _number(figure.median)


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
