# SPDX-License-Identifier: Apache-2.0
"""A program of the host's (an OCI hook, a logger), run in the host's mount namespace.

The shim lives in a mount namespace of its own and such programs must not, so they can't be
started by `subprocess`: between fork and exec comes a setns(2), and descriptors have to land
on given numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import trio

from shimv2 import namespaces

_PR_SET_PDEATHSIG = 1  # prctl(2)
_HIGH_FD = 200  # descriptors are parked above it while they are renumbered

_libc = ctypes.CDLL(None, use_errno=True)


class HostProcess:
    """A child process.  Whoever starts one ends it by `wait`, `kill` first if need be.

    Attributes:
        pid: also the id of its process group.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    @classmethod
    def start(
        cls,
        path: str,
        args: Sequence[str],
        env: Mapping[str, str] | Sequence[str],
        *,
        descriptors: Mapping[int, int],
        mount_namespace: int | None,
        cwd: Path | None = None,
        die_with_parent: bool = False,
    ) -> HostProcess:
        """Fork and execute; returns once the program runs.  Call it on the main thread.

        Args:
            args: with argv[0].
            env: the whole environment.
            descriptors: number in the child → descriptor of ours.  0 to 2 are /dev/null where
                not given; nothing else is inherited.
            mount_namespace: descriptor of the namespace to run in, None to stay.
            cwd: working directory, ``/`` where it is None.

        Raises:
            OSError: the program can't be executed; the path is its filename.
        """
        pairs = [item.partition("=") for item in env] if not isinstance(env, Mapping) else []
        environment = dict(env) if isinstance(env, Mapping) else {k: v for k, _, v in pairs}
        parent = os.getpid() if die_with_parent else 0
        report, report_write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            _child(
                path,
                args,
                environment,
                descriptors,
                mount_namespace,
                str(cwd or "/"),
                report_write,
                parent,
            )
        os.close(report_write)
        try:
            failure = os.read(report, 64)
        finally:
            os.close(report)
        if failure:
            os.waitpid(pid, 0)
            number = int(failure)
            raise OSError(number, os.strerror(number), path)
        return cls(pid)

    async def wait(self) -> int:
        """The exit status, negative for a signal; as often as wanted."""
        while self._status is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            self._reap()
        return self._status

    def kill(self, number: signal.Signals = signal.SIGKILL, *, group: bool = False) -> None:
        """Send a signal to it, or to its whole process group; one that is gone is no error."""
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self.pid, number)
            elif self._status is None:
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # somebody reaps every child of this process
            pid, status = self.pid, 0
        if pid:
            self._status = os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Give the descriptor back, after `wait`.  Idempotent."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _child(
    path: str,
    args: Sequence[str],
    env: Mapping[str, str],
    descriptors: Mapping[int, int],
    mount_namespace: int | None,
    cwd: str,
    report: int,
    parent: int,
) -> NoReturn:
    """The half of fork(2) that never returns.  No locks, no logging, no imports here."""
    try:
        os.setpgid(0, 0)
        if parent:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the signal was set
                os._exit(1)
        parked = {number: _dup_high(fd) for number, fd in descriptors.items()}
        report = _dup_high(report)
        if mount_namespace is not None:
            namespaces.setns(mount_namespace, namespaces.CLONE_NEWNS)
        os.chdir(cwd)
        null = _dup_high(os.open("/dev/null", os.O_RDWR))
        for number, fd in {0: null, 1: null, 2: null, **parked}.items():
            os.dup2(fd, number, inheritable=True)
        # The report goes when the program runs; so does all that is close-on-exec, and the
        # rest has no business there.
        os.closerange(max((2, *parked)) + 1, _HIGH_FD)
        os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(path, list(args), env)
    except OSError as error:
        os.write(report, str(error.errno or errno.EIO).encode())
    except BaseException:
        os.write(report, str(errno.EINVAL).encode())
    finally:
        os._exit(127)


def _dup_high(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
