# SPDX-License-Identifier: Apache-2.0
"""When the kernel kills for memory in a container's cgroup."""

from __future__ import annotations

import os

from agent.loop import PRIORITY, READ, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CGROUPS = "/sys/fs/cgroup"


class OomWatch:
    """One cgroup that is watched.  Args: the descriptors that `close` unwatches and closes."""

    def __init__(self, loop: Loop, watched: int, *others: int) -> None:
        self._loop = loop
        self._watched = watched
        self._others = others

    def close(self) -> None:
        if self._watched >= 0:
            self._loop.unwatch(self._watched)
            for fd in (self._watched, *self._others):
                os.close(fd)
            self._watched = -1


def watch(loop: Loop, cgroup: str, happened: Callable[[], None]) -> OomWatch | None:
    """Call `happened` after each kill; None if the kernel can't tell."""
    try:
        if os.path.exists(f"{CGROUPS}/cgroup.controllers"):
            return _watch_v2(loop, f"{CGROUPS}{cgroup}/memory.events", happened)
        return _watch_v1(loop, f"{CGROUPS}/memory{cgroup}", happened)
    except OSError:
        return None


def _watch_v2(loop: Loop, path: str, happened: Callable[[], None]) -> OomWatch:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    count = _kills(fd)

    def changed(_events: int) -> None:
        nonlocal count
        now = _kills(fd)
        if now > count:
            happened()
        count = now

    loop.watch(fd, PRIORITY, changed)
    return OomWatch(loop, fd)


def _kills(fd: int) -> int:
    try:
        text = os.pread(fd, 4096, 0).decode()
    except OSError:  # the cgroup is gone
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def _watch_v1(loop: Loop, directory: str, happened: Callable[[], None]) -> OomWatch:
    control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with open(f"{directory}/cgroup.event_control", "w", encoding="ascii") as file:
        file.write(f"{event} {control}")

    def fired(_events: int) -> None:
        try:
            os.eventfd_read(event)
        except BlockingIOError:
            return
        if os.path.isdir(directory):  # the removal of the cgroup fires too
            happened()

    loop.watch(event, READ, fired)
    return OomWatch(loop, event, control)
