# SPDX-License-Identifier: Apache-2.0
"""Helper processes that cannot outlive us: VMMs, virtiofsd.

A helper is started on the *main thread*, because Linux ties a parent-death signal to the
thread that forked (prctl(2), PR_SET_PDEATHSIG) and a worker thread of trio ends when idle.
It gets its own session, ``/dev/null`` as stdin, and one pipe as stdout and stderr, whose
text is untrusted: only the last lines are kept, bounded in length and stripped of control
characters.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio

from vmm.errors import VmmConfigError, VmmError
from vmm.hypervisor import Placement

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CLONE_NEWNET = 0x40000000  # linux/sched.h

RING_LINES = 20
"""Lines of output kept for error messages."""
LINE_BYTES = 1024
"""A longer line is cut."""

_libc = ctypes.CDLL(None, use_errno=True)


class OutputRing:
    """The last lines of an untrusted byte stream, printable and bounded."""

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        self._lines: deque[str] = deque(maxlen=RING_LINES)
        self._partial = b""
        self._cut = False
        self._on_line = on_line

    def feed(self, data: bytes) -> None:
        """Take bytes as they come; complete lines go to `on_line` as well."""
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._append(piece)
            self._finish_line()
        self._append(rest)

    def close(self) -> None:
        """The stream ended: an unfinished line counts as one."""
        if self._partial:
            self._finish_line()

    def lines(self) -> list[str]:
        return list(self._lines)

    def text(self) -> str:
        """The kept lines joined by newlines, without blank ones."""
        return "\n".join(line for line in self._lines if line.strip())

    def _append(self, piece: bytes) -> None:
        room = LINE_BYTES - len(self._partial)
        if len(piece) > room:
            self._cut = True
        self._partial += piece[:room]

    def _finish_line(self) -> None:
        text = self._partial.decode("utf-8", "replace").rstrip("\r")
        line = "".join(c if c.isprintable() or c == "\t" else "�" for c in text)
        if self._cut:
            line += "…"
        self._partial, self._cut = b"", False
        self._lines.append(line)
        if self._on_line is not None:
            self._on_line(line)


class HelperProcess:
    """One child process with an owner.

    ``start`` puts two tasks into the owner's nursery: one reads the output, one waits for
    the end.  If that nursery is cancelled the process is killed and reaped before the
    nursery closes, so that a process never outlives the block that owns it.

    Args:
        argv: the program's absolute path, then its arguments.
        name: for messages ("qemu", "virtiofsd").
        placement: network namespace and cgroups to enter before exec.
        pass_fds: descriptors the child inherits under the same numbers.
        on_line: called with every line of output (already made printable).
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        name: str,
        placement: Placement | None = None,
        pass_fds: Iterable[int] = (),
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.argv = list(argv)
        self.name = name
        self.output = OutputRing(on_line)
        self._placement = placement or Placement()
        self._pass_fds = tuple(pass_fds)
        self._popen: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._returncode: int | None = None
        self._pidfd = -1
        self._pipe = -1
        self._ended = trio.Event()
        self._read_scope = trio.CancelScope()

    @property
    def pid(self) -> int:
        """Process id; after the end it may belong to another process."""
        if not self._pid:
            raise VmmError(f"{self.name} was not started")
        return self._pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal, None while it runs (or was never started)."""
        return self._returncode

    @property
    def started(self) -> bool:
        return self._pid != 0

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def start(self, nursery: trio.Nursery) -> None:
        """Fork and exec, without waiting for anything the program does.

        Raises:
            VmmConfigError: the program, the namespace or a cgroup cannot be used.
            RuntimeError: not called on the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("helpers must be started on the main thread (parent-death signal)")
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self._pipe = read_end
        os.set_blocking(read_end, False)
        try:
            self._pid = self._spawn(write_end)
        except BaseException:
            os.close(read_end)
            self._pipe = -1
            raise
        finally:
            os.close(write_end)
        self._take_pidfd()
        self._start_tasks(nursery)

    def _take_pidfd(self) -> None:
        self._pidfd = os.pidfd_open(self._pid)

    def _start_tasks(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._read_output, name=f"{self.name} output")
        nursery.start_soon(self._watch, name=f"{self.name} watch")

    async def wait(self) -> int:
        """Return the exit status (negative for a signal) once the process was reaped."""
        await self._ended.wait()
        assert self._returncode is not None
        return self._returncode

    def send_signal(self, signum: int) -> None:
        """Signal the process unless it has ended; never hits a recycled pid."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signum)
            except ProcessLookupError:
                return

    async def kill(self) -> None:
        """SIGKILL and reap, also under cancellation.  Idempotent."""
        if not self._pid:
            return
        self._kill_all()
        with trio.CancelScope(shield=True):
            await self._ended.wait()

    def describe_end(self) -> str:
        """One sentence about the end, then the last lines of output."""
        code = self.returncode
        if code is None:
            how = f"{self.name} is still running"
        elif code < 0:
            try:
                how = f"{self.name} was killed by {signal.Signals(-code).name}"
            except ValueError:
                how = f"{self.name} was killed by signal {-code}"
        else:
            how = f"{self.name} exited with status {code}"
        text = self.output.text()
        return f"{how}:\n{text}" if text else how

    def _spawn(self, output_fd: int) -> int:
        """Run the program; returns its pid."""
        self._popen = self._popen_on(output_fd)
        return self._popen.pid

    def _popen_on(self, output_fd: int) -> subprocess.Popen[bytes]:
        with ExitStack() as opened:
            netns_fd = -1
            if self._placement.netns is not None:
                netns_fd = _open(self._placement.netns, os.O_RDONLY, "network namespace")
                opened.callback(os.close, netns_fd)
            cgroup_fds = []
            for procs in self._placement.cgroup_procs:
                cgroup_fds.append(_open(_for_one_thread(procs), os.O_WRONLY, "cgroup"))
                opened.callback(os.close, cgroup_fds[-1])
            parent = os.getpid()

            def before_exec() -> None:
                try:
                    for fd in cgroup_fds:
                        os.write(fd, b"0")
                    if netns_fd >= 0 and _libc.setns(netns_fd, CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                    if _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
                        raise OSError(ctypes.get_errno(), "prctl")
                    if os.getppid() != parent:  # it died before the signal was set
                        os._exit(1)
                except OSError as error:
                    os.write(output_fd, f"before exec: {error}\n".encode())
                    raise

            try:
                return subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output_fd,
                    stderr=output_fd,
                    pass_fds=self._pass_fds,
                    start_new_session=True,
                    preexec_fn=before_exec,  # noqa: PLW1509 - see docs: no threads hold locks here
                )
            except OSError as error:
                raise VmmConfigError(
                    f"cannot run {self.name} {self.argv[0]}: {error.strerror}"
                ) from error
            except subprocess.SubprocessError as error:
                self._drain_pipe()
                detail = self.output.text() or str(error)
                raise VmmConfigError(f"cannot start {self.name}: {detail}") from error

    async def _read_output(self) -> None:
        with self._read_scope:
            while self._pipe >= 0:  # the reaper closes it, maybe just after we were woken
                try:
                    data = os.read(self._pipe, 65536)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._pipe)
                    continue
                if not data:
                    return
                self.output.feed(data)
                await trio.lowlevel.checkpoint()

    async def _watch(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._pidfd)
        finally:
            with trio.CancelScope(shield=True):
                self._kill_all()
                await trio.lowlevel.wait_readable(self._pidfd)
            self._reap()

    def _kill_all(self) -> None:
        """The process and what it forked; its pid names the group until it is reaped."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)

    def _take_status(self) -> int:
        """The exit status of the process, which has ended."""
        assert self._popen is not None
        return self._popen.wait()

    def _reap(self) -> None:
        self._returncode = self._take_status()
        trio.lowlevel.notify_closing(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._read_scope.cancel()
        self._drain_pipe()
        self.output.close()
        trio.lowlevel.notify_closing(self._pipe)
        os.close(self._pipe)
        self._pipe = -1
        self._ended.set()

    def _drain_pipe(self) -> None:
        """Take what is left in the pipe, at most what a pipe holds."""
        for _ in range(16):
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                return
            if not data:
                return
            self.output.feed(data)


def _for_one_thread(procs: Path) -> Path:
    """Where a process with one thread enters the cgroup of a `cgroup.procs` soonest.

    For all threads of a process the kernel locks out every fork and waits for an RCU grace period,
    10 to 30 ms; for the thread that writes it does not (kernel/cgroup/cgroup.c,
    cgroup_procs_write_start).  Version 2 has no such file in a cgroup of processes.
    """
    tasks = procs.with_name("tasks")
    return tasks if tasks.exists() else procs


def _open(path: os.PathLike[str], flags: int, what: str) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise VmmConfigError(f"cannot open {what} {os.fspath(path)}: {error.strerror}") from error
