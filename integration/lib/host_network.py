# SPDX-License-Identifier: Apache-2.0
"""A network namespace that plays the host, so that tests leave the real one alone.

What runs "on the host" of a network test (containerd, CNI plugins, peers of a pod) runs in
there: bridges, NAT rules and the other ends of veth pairs are gone with it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

_numbers = itertools.count(1)
_CLONE_NEWNET = 0x40000000

_T = TypeVar("_T")


class HostNetwork:
    """A context manager.

    Attributes:
        path: of the namespace.
    """

    def __init__(self) -> None:
        self.name = f"pykata-{os.getpid()}-{next(_numbers)}"
        self.path = Path("/run/netns", self.name)

    def __enter__(self) -> Self:
        _ip("netns", "add", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _ip("netns", "del", self.name)

    @property
    def launcher(self) -> list[str]:
        """Put before a command to run it in there, with the mounts of the host."""
        return ["nsenter", f"--net={self.path}"]

    def run(self, *command: str, **more: Any) -> str:
        """Run a program in there; returns its output."""
        done = subprocess.run(
            [*self.launcher, *command], check=True, stdout=subprocess.PIPE, text=True, **more
        )
        return str(done.stdout)

    def call(self, work: Callable[[], _T]) -> _T:
        """Call `work` in there.  Sockets that it makes stay in there."""
        return call_in(self.path, work)


def call_in(netns: Path, work: Callable[[], _T]) -> _T:
    """Call `work` on a thread that has entered a network namespace."""
    found: list[_T] = []
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)
            found.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return found[0]


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)
