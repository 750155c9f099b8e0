# SPDX-License-Identifier: Apache-2.0
"""Every child of PID 1 is reaped here, and nowhere else.

A process may end before anybody knows its pid (`crun exec --detach` writes the pid file while
the process may be over), so the status of a pid nobody asked for yet is kept for a while.  Pids
are used again: who claims a pid says since when its process can have lived.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal imports enum
import os

from agent.loop import READ, Future, Loop

_UNCLAIMED_LIMIT = 4096  # statuses kept; orphans of containers are never claimed


class Reaper:
    """Statuses of ended children: 0–255, or 128 + n for signal n."""

    def __init__(self, loop: Loop) -> None:
        self._waiting: dict[int, Future] = {}
        self._unclaimed: dict[int, tuple[int, int]] = {}  # pid: (status, when it was reaped)
        self._reaped = 0
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        loop.watch(self._read_end, READ, self._woken)

    def mark(self) -> int:
        """Now, in the order of ends."""
        return self._reaped

    def status_of(self, pid: int, since: int | None = None) -> Future:
        """The exit status of a child, now or later.  One claim a pid.

        Args:
            since: the `mark` before the child was made, if it may have ended already.
        """
        future = self._waiting.get(pid)
        if future is not None:
            return future
        future = Future()
        status, when = self._unclaimed.pop(pid, (0, -1))
        if since is not None and when > since:
            future.set(status)
        else:
            self._waiting[pid] = future
        return future

    def collect(self) -> None:
        """Reap all that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code
            self._reaped += 1
            future = self._waiting.pop(pid, None)
            if future is not None:
                future.set(code)
                continue
            if len(self._unclaimed) >= _UNCLAIMED_LIMIT:
                del self._unclaimed[next(iter(self._unclaimed))]
            self._unclaimed[pid] = (code, self._reaped)

    def _woken(self, _events: int) -> None:
        try:
            os.read(self._read_end, 4096)
        except BlockingIOError:
            pass
        self.collect()
