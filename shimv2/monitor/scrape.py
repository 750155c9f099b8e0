# SPDX-License-Identifier: Apache-2.0
"""One page of the figures of all sandboxes, whatever state each is in."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass

import trio

from shimv2.boot.prometheus import Starts
from shimv2.management.client import FetchError, fetch
from shimv2.metrics import procfs
from shimv2.metrics.durations import Durations
from shimv2.metrics.exposition import Page, parse
from shimv2.metrics.sandbox import RESERVED, add_process_families
from shimv2.monitor.sandboxes import Sandbox, sandboxes
from shimv2.monitor.starts import BEGINNING, later_than, place_of

log = logging.getLogger("kata-monitor")

#: Seconds for one shim; its own limit for a guest that does not answer is 3.
SHIM_LIMIT = 5.0
#: For all of them: Prometheus waits for 10.
ALL_LIMIT = 9.0
_AT_ONCE = 16
_SAMPLES = 50_000  # of one sandbox


@dataclass(slots=True)
class _Outcome:
    """How one shim's scrape went: `gone` is no failure, but the end of a sandbox."""

    sandbox: Sandbox
    page: Page | None = None
    gone: bool = False


class Scraper:
    """Scrapes, and counts how that goes."""

    def __init__(self) -> None:
        self._scrapes = 0
        self._failures = 0
        self._durations = Durations()
        self._starts = Starts()
        self._last_start = BEGINNING

    async def page(self) -> Page:
        """The figures of every sandbox that answers in time, and of this process."""
        began = time.monotonic()
        outcomes = [_Outcome(sandbox) for sandbox in sandboxes()]
        free = trio.CapacityLimiter(_AT_ONCE)
        with trio.move_on_after(ALL_LIMIT):
            async with trio.open_nursery() as nursery:
                for outcome in outcomes:
                    nursery.start_soon(self._scrape, outcome, free)
        there = [outcome for outcome in outcomes if not outcome.gone]
        self._scrapes += 1
        self._failures += sum(outcome.page is None for outcome in there)
        self._durations.add(time.monotonic() - began)
        page = Page()
        await trio.to_thread.run_sync(self._add_own, page)
        page.value("kata_monitor_running_shim_count", "Sandboxes of this host.", len(there))
        for outcome in there:
            up = [(outcome.sandbox.labels, int(outcome.page is not None))]
            page.add("kata_monitor_shim_up", "Whether the sandbox's shim answered.", up)
            if outcome.page is not None:
                page.merge(outcome.page, outcome.sandbox.labels)
        return page

    async def _scrape(self, outcome: _Outcome, free: trio.CapacityLimiter) -> None:
        async with free:
            try:
                text = await fetch(outcome.sandbox.socket, "/metrics", limit=SHIM_LIMIT)
            except FetchError as error:
                outcome.gone = error.gone
                if not error.gone:
                    log.warning("sandbox %s: %s", outcome.sandbox.id, error)
                return
        outcome.page = parse(
            text.decode(errors="replace"), samples=_SAMPLES, rename=_name, reserved=RESERVED
        )

    def _add_own(self, page: Page) -> None:
        page.value("kata_monitor_scrape_count", "Scrapes.", self._scrapes, "counter")
        page.value(
            "kata_monitor_scrape_failed_count",
            "Shims that did not answer, over all scrapes.",
            self._failures,
            "counter",
        )
        page.histogram(
            "kata_monitor_scrape_durations_histogram_milliseconds",
            "How long it took to ask all shims.",
            self._durations,
            (),
        )
        add_process_families(page, procfs.read([os.getpid()]), "kata_monitor_")
        for record in later_than(self._last_start):
            self._starts.add(record)
            self._last_start = place_of(record)
        self._starts.expose(page)


def _name(name: str) -> str:
    # What a shim tells of its own process has no name of Kata's.
    return f"kata_shim_{name}" if name.startswith(("process_", "go_")) else name
