# SPDX-License-Identifier: Apache-2.0
"""Starts as bars of characters."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .history import BootRecord
from .phases import ASIDE, phases, total

_LEAST_BAR = 10
_LEAST_HEADING = 60  # columns: the id's first few characters are among them
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render(records: list[BootRecord], width: int, *, unicode: bool = True) -> str:
    """Lines of at most `width` columns (but bars of at least 10), all starts to one scale."""
    scale = max(map(total, records), default=0.0)
    titles = [phase.title for record in records for phase in phases(record)]
    label = max(map(len, titles), default=0)
    blocks = ("\n".join(_block(record, scale, width, label, unicode)) for record in records)
    return "\n\n".join(blocks)


def heading(record: BootRecord) -> str:
    """One line: how the VM came to be, how long it took, when, and which start this is.

    The id is last: of a long one, a narrow terminal shows what the command takes for it.
    """
    by = f" by {record.accelerator.upper()}" if record.accelerator else ""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started / 1e9))
    return f"{record.kind} start{by}, {total(record):.3f} s  {at}  {record.id}"


def _block(
    record: BootRecord, scale: float, width: int, label: int, unicode: bool
) -> Iterator[str]:
    found = phases(record)
    bar = max(_LEAST_BAR, width - label - len("  0.000 s  100 %  "))
    yield heading(record)[: max(width, _LEAST_HEADING)]
    whole = total(record)
    for phase in found:
        share = phase.seconds / whole if whole else 0.0
        drawn = _bar(phase.begin, phase.end, scale, bar, unicode)
        yield f"{phase.title:{label}} {phase.seconds:6.3f} s {share:4.0%}  {drawn}".rstrip()
    beside = [f"{ASIDE[m]} at {record.marks[m]:.3f} s" for m in ASIDE if m in record.marks]
    for text in beside:
        yield f"  beside: {text}"


def _bar(begin: float, end: float, scale: float, width: int, unicode: bool) -> str:
    if not scale:
        return ""
    first = min(int(begin / scale * width), width - 1)
    if not unicode:
        last = max(first + 1, min(width, round(end / scale * width)))
        return " " * first + "#" * (last - first)
    # Eighths of a column for the end; the beginning can only be a whole one.
    eighths = max(1, round(end / scale * width * 8) - first * 8)
    full, rest = divmod(eighths, 8)
    return " " * first + "█" * full + (_EIGHTHS[rest] if rest else "")
