# SPDX-License-Identifier: Apache-2.0
"""A pid namespace for the containers of a pod that share one, and the process that holds it.

With a runtime that creates the pause container in the guest, as Kata's, that is its pid
namespace.  Without one a process of ours is number 1 in it: it does nothing, ends by nothing
from inside, and what becomes its child is reaped by the kernel, since it ignores SIGCHLD.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal imports enum
import os

from agent import syscalls

_PROGRAM = "/usr/bin/sleep"
_NAME = "/run/agent/pause"  # what its name is in lists of processes


def hold_pid_namespace() -> int:
    """Make one; returns the pid of its number 1 as we see it.

    Raises:
        OSError: the kernel refuses.
    """
    if not os.path.lexists(_NAME):
        os.symlink(_PROGRAM, _NAME)
    ours = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWPID)  # for the children to come
        try:
            pid = os.fork()  # posix_spawn has no way to say which signals are ignored
            if pid == 0:
                _become_holder()
        finally:
            syscalls.setns(ours, syscalls.CLONE_NEWPID)
    finally:
        os.close(ours)
    return pid


def _become_holder() -> None:
    try:
        for number in (_signal.SIGCHLD, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGINT):
            _signal.signal(number, _signal.SIG_IGN)  # stays so over exec
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.setsid()
        # A program of many names goes by its first argument, the kernel by the file's.
        os.execve(_NAME, ["sleep", "2147483647"], {})
    finally:
        os._exit(127)
