# SPDX-License-Identifier: Apache-2.0
"""A helper that can change hands: its parent is a keeper, not whoever uses it.

A process can't be given to another parent, and its parent's death must end it.  So the keeper
is a small process of its own that holds the reading end of a pipe and kills the helper when
nobody holds the writing end any more.  Who has that end, the pidfd and the two other pipes is
the owner; all of them can be sent over a unix socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
from collections.abc import Callable
from typing import NoReturn, Self

import trio

from vmm.errors import VmmConfigError, VmmError
from vmm.process import HelperProcess

_PR_SET_NAME = 15  # linux/prctl.h
_STATUS = struct.Struct("=i")
_STATUS_WAIT = 5.0
"""Seconds for a keeper to tell the status of a process that has ended; it does so at once."""


class KeptProcess(HelperProcess):
    """As `HelperProcess`, with a keeper between.  Killed alone: it is expected not to fork."""

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self._owner = -1  # writing end: the helper lives as long as somebody has it open
        self._report = -1  # the keeper's words: the pid, later the exit status
        self._let_go = False
        self._watch_scope = trio.CancelScope()
        self.keeper_pid = 0

    @classmethod
    def adopt(
        cls,
        pid: int,
        keeper_pid: int,
        descriptors: tuple[int, ...],
        *,
        name: str,
        nursery: trio.Nursery,
        on_line: Callable[[str], None] | None = None,
    ) -> Self:
        """Become the owner of a process that another owner let go.

        Args:
            descriptors: as `let_go` returned them; ours from here on.
        """
        self = cls([name], name=name, on_line=on_line)
        self._pid, self.keeper_pid = pid, keeper_pid
        self._pidfd, self._owner, self._report, self._pipe = descriptors
        os.set_blocking(self._pipe, False)
        self._start_tasks(nursery)
        return self

    def let_go(self) -> tuple[int, ...]:
        """Stop watching, without ending it.

        Returns:
            pidfd, owner, report and output: descriptors for the next owner; the caller's own.
        """
        descriptors = tuple(
            os.dup(fd) for fd in (self._pidfd, self._owner, self._report, self._pipe)
        )
        self._let_go = True
        self._watch_scope.cancel()
        return descriptors

    def _spawn(self, output_fd: int) -> int:
        owner_read, self._owner = os.pipe2(os.O_CLOEXEC)
        self._report, report_write = os.pipe2(os.O_CLOEXEC)
        try:
            self.keeper_pid = os.fork()
            if self.keeper_pid == 0:
                _leave_trio()
                self._keep(owner_read, report_write, output_fd)
        finally:
            os.close(owner_read)
            os.close(report_write)
        answer = os.read(self._report, _STATUS.size)
        if len(answer) < _STATUS.size:
            self._drain_pipe()
            os.waitpid(self.keeper_pid, 0)
            self._close_own()
            text = self.output.text()
            raise VmmConfigError(f"cannot run {self.name} {self.argv[0]}: {text}")
        return int(_STATUS.unpack(answer)[0])

    def _take_pidfd(self) -> None:
        super()._take_pidfd()
        os.write(self._owner, b"\0")  # from now on its keeper may reap it

    def _keep(self, owner_read: int, report_write: int, output_fd: int) -> NoReturn:
        """The keeper's life."""
        status = 1
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(_PR_SET_NAME, b"vm-keeper", 0, 0, 0)
            try:
                process = self._popen_on(output_fd)
            except VmmError as error:
                os.write(output_fd, f"{error}\n".encode())
                os._exit(1)
            _close_others({owner_read, report_write})
            os.write(report_write, _STATUS.pack(process.pid))
            ended = os.pidfd_open(process.pid)
            readable: list[int] = []
            if os.read(owner_read, 1):  # the owner has its own pidfd; else it is gone
                readable, _, _ = select.select([owner_read, ended], [], [])
            if ended not in readable:
                process.kill()
            with contextlib.suppress(OSError):  # nobody listens any more
                os.write(report_write, _STATUS.pack(process.wait()))
            status = 0
        finally:
            os._exit(status)

    async def _watch(self) -> None:
        try:
            with self._watch_scope:
                await trio.lowlevel.wait_readable(self._pidfd)
        finally:
            if self._let_go:
                self._close()
            else:
                with trio.CancelScope(shield=True):
                    self._kill_all()
                    await trio.lowlevel.wait_readable(self._pidfd)
                self._reap()

    def _kill_all(self) -> None:
        if not self._let_go:
            self.send_signal(signal.SIGKILL)

    def _take_status(self) -> int:
        status = -signal.SIGKILL
        if select.select([self._report], [], [], _STATUS_WAIT)[0]:
            data = os.read(self._report, _STATUS.size)
            if len(data) == _STATUS.size:
                status = _STATUS.unpack(data)[0]
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.keeper_pid, 0)
        self._close_own()
        return int(status)

    def _close_own(self) -> None:
        for fd in (self._owner, self._report):
            os.close(fd)
        self._owner = self._report = -1

    def _close(self) -> None:
        """What `let_go` leaves to do: it belongs to somebody else now."""
        self._read_scope.cancel()
        for fd in (self._pidfd, self._pipe):
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        self._pidfd = self._pipe = -1
        self._close_own()
        self._ended.set()


def _leave_trio() -> None:
    """A fork of a running event loop must do nothing in its name."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its end is the pipe's, and nothing else's
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _close_others(keep: set[int]) -> None:
    """Close every descriptor but these: those of other helpers above all, whose owners must be
    seen to go."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep and fd > 2:
            with contextlib.suppress(OSError):
                os.close(fd)
