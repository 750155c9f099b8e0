# SPDX-License-Identifier: Apache-2.0
"""How long calls took, in the buckets of Kata's histograms."""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections.abc import Iterator

#: Upper bounds in milliseconds.
BUCKETS = tuple(1 << power for power in range(10))


class Durations:
    """A histogram for each key: a call's name, or several words.

    Attributes:
        counts: key → how many fell in each bucket, the last one without a bound.
        sums: key → milliseconds of all.
    """

    def __init__(self, buckets: tuple[int, ...] = BUCKETS) -> None:
        self.buckets = buckets
        self.counts: dict[tuple[str, ...], list[int]] = {}
        self.sums: dict[tuple[str, ...], float] = {}

    def add(self, seconds: float, *key: str) -> None:
        milliseconds = seconds * 1000
        counts = self.counts.get(key)
        if counts is None:
            counts = self.counts[key] = [0] * (len(self.buckets) + 1)
            self.sums[key] = 0.0
        counts[bisect_left(self.buckets, milliseconds)] += 1
        self.sums[key] += milliseconds

    @contextlib.contextmanager
    def of(self, *key: str) -> Iterator[None]:
        """Counts its block, however that ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(time.monotonic() - began, *key)
