# SPDX-License-Identifier: Apache-2.0
"""Programs the agent runs: crun, mkfs, iptables.  By posix_spawn, which doesn't copy PID 1."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal imports enum
import os

from agent.loop import READ, WRITE, Future, Loop
from agent.reaper import Reaper
from agent.waiting import Command, CommandResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "XDG_RUNTIME_DIR": "/run",
}

_OUTPUT_LIMIT = 1 << 20  # bytes kept of what a helper prints
_IGNORED_BY_PYTHON = (_signal.SIGPIPE, _signal.SIGXFSZ)


def spawn(
    argv: list[str],
    *,
    stdin: int = -1,
    stdout: int = -1,
    stderr: int = -1,
    environment: Mapping[str, str] = ENVIRONMENT,
    new_session: bool = False,
) -> int:
    """Start a program; a stream of -1 is /dev/null.  Returns its pid.

    Raises:
        OSError: it can't be executed.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
    for number, fd in enumerate((stdin, stdout, stderr)):
        if fd < 0:
            actions.append((os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0))
        else:
            actions.append((os.POSIX_SPAWN_DUP2, fd, number))
    return os.posix_spawn(
        argv[0],
        argv,
        environment,
        file_actions=actions,
        setsigdef=_IGNORED_BY_PYTHON,
        setsid=new_session,
    )


class Commands:
    """Runs a `Command` of agent.waiting to its end without blocking the loop."""

    def __init__(self, loop: Loop, reaper: Reaper) -> None:
        self._loop = loop
        self._reaper = reaper
        loop.run_command = self.run

    def run(self, command: Command) -> Future:
        """The future is a CommandResult, or an OSError for a program that can't be started."""
        future = Future()
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        (in_read, in_write), (out_read, out_write), (err_read, err_write) = ends
        try:
            pid = spawn(command.argv, stdin=in_read, stdout=out_write, stderr=err_write)
        except OSError as error:
            for pair in ends:
                for fd in pair:
                    os.close(fd)
            future.fail(error)
            return future
        for fd in (in_read, out_write, err_write):
            os.close(fd)
        collected = [_Collector(self._loop, out_read), _Collector(self._loop, err_read)]
        _Feeder(self._loop, in_write, command.stdin)

        def finish(_: Future) -> None:
            if status.done and all(c.ended.done for c in collected):
                out, err = (bytes(c.data) for c in collected)
                future.set(CommandResult(status.value, out, err))

        status = self._reaper.status_of(pid)
        for part in (status, *(c.ended for c in collected)):
            part.then(finish)
        return future


class _Collector:
    """Reads a pipe to its end; keeps the first mebibyte."""

    def __init__(self, loop: Loop, fd: int) -> None:
        self.data = bytearray()
        self.ended = Future()
        self._loop = loop
        self._fd = fd
        os.set_blocking(fd, False)
        loop.watch(fd, READ, self._read)

    def _read(self, _events: int) -> None:
        try:
            chunk = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        if chunk:
            self.data += chunk[: _OUTPUT_LIMIT - len(self.data)]
            return
        self._loop.unwatch(self._fd)
        os.close(self._fd)
        self.ended.set()


class _Feeder:
    """Writes bytes into a pipe and closes it."""

    def __init__(self, loop: Loop, fd: int, data: bytes) -> None:
        self._loop = loop
        self._fd = fd
        self._data = memoryview(data)
        os.set_blocking(fd, False)
        if data:
            loop.watch(fd, WRITE, self._write)
        else:
            os.close(fd)

    def _write(self, _events: int) -> None:
        try:
            self._data = self._data[os.write(self._fd, self._data) :]
        except BlockingIOError:
            return
        except OSError:  # it did not want all of it
            self._data = self._data[:0]
        if not self._data:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
