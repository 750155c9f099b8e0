# SPDX-License-Identifier: Apache-2.0
"""Starts as histograms in Prometheus' text format, named as Kata's metrics are."""

from __future__ import annotations

from collections.abc import Iterator

from .history import KINDS, BootRecord
from .phases import phases, total

#: Upper bounds in milliseconds: as Kata's histograms of calls, up to half a minute.
BUCKETS = tuple(1 << power for power in range(16))

_WHOLE = "kata_shim_boot_durations_histogram_milliseconds"
_PHASE = "kata_shim_boot_phase_durations_histogram_milliseconds"


def expose(records: list[BootRecord]) -> str:
    """Two families: whole starts by ``kind``, and their phases by ``kind`` and ``phase``.

    They count what is in `records`, a window that moves: read quantiles and averages, no rates.
    """
    whole: dict[tuple[str, ...], list[float]] = {}
    parts: dict[tuple[str, ...], list[float]] = {}
    for record in sorted(records, key=lambda record: KINDS.index(record.kind)):
        whole.setdefault((record.kind,), []).append(total(record))
        for phase in phases(record):
            parts.setdefault((record.kind, phase.name), []).append(phase.seconds)
    lines = [
        *_family(_WHOLE, "From the shim process to the container's start.", ("kind",), whole),
        *_family(_PHASE, "Each phase of a start.", ("kind", "phase"), parts),
    ]
    return "\n".join([*lines, ""])


def _family(
    name: str,
    text: str,
    labels: tuple[str, ...],
    series: dict[tuple[str, ...], list[float]],
) -> Iterator[str]:
    yield f"# HELP {name} {text} Of the newest starts on this host."
    yield f"# TYPE {name} histogram"
    for values, seconds in series.items():
        # Label values are our own words: none needs an escape.
        own = ",".join(f'{label}="{value}"' for label, value in zip(labels, values, strict=True))
        milliseconds = [value * 1000 for value in seconds]
        for bound in BUCKETS:
            count = sum(value <= bound for value in milliseconds)
            yield f'{name}_bucket{{{own},le="{bound}"}} {count}'
        yield f'{name}_bucket{{{own},le="+Inf"}} {len(milliseconds)}'
        yield f"{name}_sum{{{own}}} {sum(milliseconds):.3f}"
        yield f"{name}_count{{{own}}} {len(milliseconds)}"
