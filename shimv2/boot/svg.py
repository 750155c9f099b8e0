# SPDX-License-Identifier: Apache-2.0
"""Starts as an SVG: a waterfall of phases, on light and dark pages, with nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from .history import BootRecord
from .phases import Phase, phases, total

# Pixels.
_WIDTH = 860
_LEFT = 250  # where bars begin
_RIGHT = 78  # kept free for the figure behind the longest bar
_ROW = 26
_BAR = 14
_HEAD = 52
_FOOT = 42
_MARGIN = 20

_STYLE = """\
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;\
font-size:13px;fill:#1f2328}
.title{font-size:15px;font-weight:600}
.muted,.tick,.figure{fill:#59636e;font-size:12px}
.figure,.tick{font-variant-numeric:tabular-nums}
.grid{stroke:#d1d9e0;stroke-width:1}
.host{fill:#4078c8}.guest{fill:#d9822b}.pod{fill:#2f9e6e}
@media (prefers-color-scheme:dark){
text{fill:#f0f6fc}
.muted,.tick,.figure{fill:#9198a1}
.grid{stroke:#3d444d}
.host{fill:#6ea8fe}.guest{fill:#f0a04b}.pod{fill:#4cc38a}
}"""
_SIDES = {"host": "host", "guest": "guest", "pod": "pod and container"}


def draw(records: list[BootRecord]) -> str:
    """A document of its own; all starts to one scale."""
    longest = max(map(total, records), default=0.0) or 1.0
    heights = [_HEAD + _ROW * len(phases(record)) + _FOOT for record in records]
    height = sum(heights) + _MARGIN
    names = ", ".join(f"{record.kind} start {total(record):.2f} s" for record in records)
    body: list[str] = []
    top = _MARGIN
    for record, own in zip(records, heights, strict=True):
        body += _block(record, top, longest)
        top += own
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="title">',
            f'<title id="title">{escape("Phases of a sandbox: " + names)}</title>',
            f"<style>{_STYLE}</style>",
            *body,
            "</svg>",
            "",
        ]
    )


def ticks(longest: float) -> list[float]:
    """Three to eight round values from 0 to at most `longest` seconds."""
    rough = longest / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * index for index in range(int(longest / step + 1e-9) + 1)]


def _block(record: BootRecord, top: int, longest: float) -> Iterator[str]:
    found = phases(record)
    by = f" ({record.accelerator.upper()})" if record.accelerator else ""
    title = f"{record.kind.capitalize()} start{by}: {_seconds(total(record))}"
    yield f'<text class="title" x="{_MARGIN}" y="{top + 16}">{escape(title)}</text>'
    yield from _legend(found, top)
    first = top + _HEAD
    bottom = first + _ROW * len(found)
    for value in ticks(longest):
        x = _x(value, longest)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{first - 6}" y2="{bottom}"/>'
        yield (
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{value:g} s</text>"
        )
    for index, phase in enumerate(found):
        y = first + _ROW * index
        middle = y + _BAR - 3
        begin, end = _x(phase.begin, longest), _x(phase.end, longest)
        width = max(end - begin, 1.5)
        yield (
            f'<text x="{_LEFT - 12}" y="{middle}" text-anchor="end">{escape(phase.title)}</text>'
        )
        yield (
            f'<rect class="{phase.side}" x="{begin:.1f}" y="{y}" width="{width:.1f}" '
            f'height="{_BAR}" rx="2"/>'
        )
        yield (
            f'<text class="figure" x="{begin + width + 6:.1f}" y="{middle}">'
            f"{_seconds(phase.seconds)}</text>"
        )


def _legend(found: list[Phase], top: int) -> Iterator[str]:
    x: float = _LEFT + 70
    for side, name in _SIDES.items():
        seconds = sum(phase.seconds for phase in found if phase.side == side)
        if not seconds:
            continue
        text = f"{name} {_seconds(seconds)}"
        yield f'<rect class="{side}" x="{x:.0f}" y="{top + 6}" width="10" height="10" rx="2"/>'
        yield f'<text class="muted" x="{x + 16:.0f}" y="{top + 15}">{escape(text)}</text>'
        x += 40 + 6.4 * len(text)


def _x(seconds: float, longest: float) -> float:
    return _LEFT + seconds / longest * (_WIDTH - _LEFT - _RIGHT)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
