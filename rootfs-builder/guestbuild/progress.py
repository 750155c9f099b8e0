# SPDX-License-Identifier: Apache-2.0
"""What a build shows: one line a step, with the time it took, and a percentage in long ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Progress:
    """Writes steps to a text stream; redraws a line only on a terminal."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._redraws = self._stream.isatty()
        self._started = time.monotonic()
        self._shown = -1

    def note(self, text: str) -> None:
        """One line that is no step."""
        self._write(f"      {text}\n")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Announce a step, and say how long it took when it has ended without an error."""
        self._shown = -1
        begun = time.monotonic()
        self._write(f"[{begun - self._started:4.0f}s] {text}\n")
        yield
        took = time.monotonic() - begun
        if took >= 1:
            self._clear()
            self._write(f"        done in {took:.0f} s\n")

    def percent(self, done: int, total: int) -> None:
        """Progress inside a step. On a terminal each percent, elsewhere each tenth."""
        share = min(99, 100 * done // max(total, done, 1))
        if share <= self._shown or (not self._redraws and share // 10 <= self._shown // 10):
            return
        self._shown = share
        elapsed = time.monotonic() - self._started
        if self._redraws:
            self._write(f"\r        {share:3d} %  ({elapsed:.0f} s)\033[K")
        else:
            self._write(f"        {share:3d} %  ({elapsed:.0f} s)\n")

    def _clear(self) -> None:
        if self._redraws and self._shown >= 0:
            self._write("\r\033[K")

    def _write(self, text: str) -> None:
        if not self._quiet:
            self._stream.write(text)
            self._stream.flush()
