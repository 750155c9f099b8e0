# SPDX-License-Identifier: Apache-2.0
"""Starts as histograms, named as Kata's metrics are."""

from __future__ import annotations

from collections.abc import Iterable

from shimv2.metrics.durations import Durations
from shimv2.metrics.exposition import Page

from .history import BootRecord
from .phases import phases, total

#: Upper bounds in milliseconds: as Kata's histograms of calls, up to half a minute.
BUCKETS = tuple(1 << power for power in range(16))


class Starts:
    """Counts starts: whole ones by ``kind``, and their phases by ``kind`` and ``phase``."""

    def __init__(self) -> None:
        self._whole = Durations(BUCKETS)
        self._phases = Durations(BUCKETS)

    def add(self, record: BootRecord) -> None:
        """One more."""
        self._whole.add(total(record), record.kind)
        for phase in phases(record):
            self._phases.add(phase.seconds, record.kind, phase.name)

    def expose(self, page: Page) -> None:
        """Two families."""
        page.histogram(
            "kata_shim_boot_durations_histogram_milliseconds",
            "From the shim process to the container's start.",
            self._whole,
            ("kind",),
        )
        page.histogram(
            "kata_shim_boot_phase_durations_histogram_milliseconds",
            "Each phase of a start.",
            self._phases,
            ("kind", "phase"),
        )


def expose(records: Iterable[BootRecord]) -> str:
    """The text of both families for these starts.

    If `records` are those that a host keeps, that is a window that moves: read quantiles and
    averages, no rates.
    """
    starts = Starts()
    for record in records:
        starts.add(record)
    page = Page()
    starts.expose(page)
    return str(page)
