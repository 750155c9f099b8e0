# SPDX-License-Identifier: Apache-2.0
"""What a process has from its parent, apart from memory and descriptors.

A ready shim is a child of another process than ``start``.  What can be changed it takes over
from ``start``; where anything else differs it refuses, and ``start`` forks a shim itself.
"""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
# Of /proc/self/status, beside capabilities.  Seccomp's filters can't be read, only counted.
_STATUS = (
    *("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters"),
    *("THP_enabled", "Speculation_Store_Bypass", "SpeculationIndirectBranch"),
)
# In /proc/self; where a kernel lacks one both lack it.
_FILES = ("attr/current", "coredump_filter", "loginuid", "personality", "timerslack_ns")
_CGROUP_ROOT = "/sys/fs/cgroup"


class DifferentError(Exception):
    """The nursery can't make a process as ``start`` would; the message says in what."""


def code() -> list[object]:
    """What tells this installation, and each update of it, from any other."""
    file = os.path.abspath(__file__)  # made anew by each `make install`, with all the others
    library = os.path.dirname(os.path.dirname(os.path.dirname(file)))
    status = os.stat(file)
    return [library, status.st_ino, status.st_ctime_ns, sys.executable, sys.version]


def fixed() -> dict[str, object]:
    """What a process can't take over from another: its namespaces, rights and confinement.

    Nor what can be, but hardly ever differs.
    """
    found: dict[str, object] = {}
    for name in _NAMESPACES:
        try:
            found[f"{name} namespace"] = os.readlink(f"/proc/self/ns/{name}")
        except FileNotFoundError:  # a kernel without it
            found[f"{name} namespace"] = ""
    for name, value in _status().items():
        if name in _STATUS or name.startswith("Cap"):
            found[name] = value
    for name in _FILES:
        try:
            found[name] = _read(name)
        except OSError:
            found[name] = ""
    found["scheduling"] = [os.sched_getscheduler(0), os.sched_getparam(0).sched_priority]
    found["encoding"] = sys.getfilesystemencoding()
    root = os.stat("/")
    found["root directory"] = [root.st_dev, root.st_ino]
    return found


def inherited() -> dict[str, Any]:
    """What ``start`` has and its shim is to have; only values that JSON knows."""
    mask = os.umask(0)
    os.umask(mask)
    status = _status()
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "umask": mask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": sorted(os.sched_getaffinity(0)),
        "oom_score_adj": _read("oom_score_adj"),
        "limits": {str(number): resource.getrlimit(number) for number in _limits()},
        "cgroups": _read("cgroup"),
        "ignored": _signals(status["SigIgn"]),
        "blocked": _signals(status["SigBlk"]),
    }


def take_over(wanted: dict[str, Any]) -> None:
    """Make this process as `wanted` by `inherited` of another.

    Raises:
        DifferentError, OSError: it can't be.
    """
    import signal

    _move(wanted["cgroups"])
    for number, limits in wanted["limits"].items():
        soft, hard = limits
        resource.setrlimit(int(number), (soft, hard))
    os.sched_setaffinity(0, wanted["processors"])
    os.setpriority(os.PRIO_PROCESS, 0, wanted["nice"])
    if _read("oom_score_adj") != wanted["oom_score_adj"]:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(wanted["oom_score_adj"])
    ignored = _signals(_status()["SigIgn"])
    for number in set(wanted["ignored"]).difference(ignored):
        signal.signal(number, signal.SIG_IGN)
    for number in set(ignored).difference(wanted["ignored"]):  # as by nohup, or a shell's `&`
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, wanted["blocked"])
    os.umask(wanted["umask"])
    os.chdir(wanted["directory"])
    os.environ.clear()
    os.environ.update(wanted["environment"])


def _read(name: str) -> str:
    with open(f"/proc/self/{name}") as file:
        return file.read().strip("\0\n")


def _status() -> dict[str, str]:
    with open("/proc/self/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _signals(mask: str) -> list[int]:
    """Numbers of the signals in a mask of /proc/self/status."""
    bits = int(mask, 16)
    return [number for number in range(1, 65) if bits >> (number - 1) & 1]


def _limits() -> list[int]:
    return [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def _move(wanted: str) -> None:
    """Join the cgroups of another process, given as the text of its /proc/PID/cgroup."""
    own = set(_read("cgroup").splitlines())
    for line in wanted.splitlines():
        if line in own:
            continue
        _, controllers, path = line.split(":", 2)
        for directory in _mounted(controllers):
            if os.path.isdir(directory):
                # This process has one thread, which version 1 lets in without delay (vmm.process).
                name = "tasks" if controllers else "cgroup.procs"
                with open(f"{directory}{path}/{name}", "w") as file:
                    file.write("0")
                break
        else:
            raise DifferentError(
                f"no cgroup hierarchy of {controllers or 'version 2'!r} is mounted"
            )


def _mounted(controllers: str) -> list[str]:
    if not controllers:  # version 2, by itself or beside version 1
        return [f"{_CGROUP_ROOT}/unified", _CGROUP_ROOT]
    return [f"{_CGROUP_ROOT}/{controllers.removeprefix('name=')}"]
