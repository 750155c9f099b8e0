# SPDX-License-Identifier: Apache-2.0
"""A root shell of the guest on a vsock port, for `kata-runtime exec`."""

from __future__ import annotations

import os

from agent import log
from agent.loop import READ, Loop
from agent.reaper import Reaper
from agent.spawn import ENVIRONMENT, spawn
from agent.stdio import RawInput, RawOutput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SHELLS = ("/run/kata-extensions/devkit/bin/devkit-sh", "/bin/bash", "/bin/sh")
_SIGHUP, _SIGKILL = 1, 9


def listen(listener: Any, loop: Loop, reaper: Reaper) -> None:
    """Give each connection a shell on a pty of its own; its end is the shell's."""

    def accept(_events: int) -> None:
        try:
            fd, _ = listener._accept()
        except OSError:
            return
        _Console(fd, loop, reaper)

    loop.watch(listener.fileno(), READ, accept)


class _Console:
    """One shell and its connection."""

    def __init__(self, fd: int, loop: Loop, reaper: Reaper) -> None:
        shell = next((path for path in SHELLS if os.path.exists(path)), "")
        if not shell:
            log.warning("debug console: the guest image has no shell")
            os.close(fd)
            return
        leader, follower = os.openpty()
        # A session of its own that opens the pty as its controlling terminal.
        name = os.ttyname(follower)
        self._follower = follower  # kept open: without one the leader reads an error
        environment = {**ENVIRONMENT, "TERM": "linux", "PS1": "guest# "}
        script = f"exec <>{name} >&0 2>&1; exec {shell} -i"
        pid = spawn(["/bin/sh", "-c", script], environment=environment, new_session=True)
        loop_fd = os.dup(fd)
        self._output = RawOutput(loop, leader, fd, is_pipe=False)
        self._input = _HangingUp(loop, loop_fd, os.dup(leader), pid)
        reaper.status_of(pid).then(lambda _: self._close())

    def _close(self) -> None:
        self._input.close()
        self._output.process_ended().then(lambda _: self._output.close())
        os.close(self._follower)


class _HangingUp(RawInput):
    """Tells the shell when its connection is closed."""

    def __init__(self, loop: Loop, source: int, target: int, pid: int) -> None:
        super().__init__(loop, source, target, is_terminal=True)
        self._pid = pid

    def close(self) -> None:
        was_open = self._source >= 0
        super().close()
        if was_open:
            try:
                os.killpg(self._pid, _SIGHUP)
            except ProcessLookupError:
                pass
