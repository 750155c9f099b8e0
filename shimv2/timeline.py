# SPDX-License-Identifier: Apache-2.0
"""When each phase of a sandbox's start was reached, on the host's monotonic clock."""

from __future__ import annotations

import time


class Timeline:
    """Marks in the order they were reached; the zero is the start of the shim process.

    Args:
        origin: `time.monotonic()` at the zero; by default this process's own start, which
            the kernel knows to a hundredth of a second.

    Attributes:
        kind: how the VM started: ``cold``, ``template`` or ``cache``.
        accelerator: of the VM, as QEMU calls it; "" as long as there is none.
        began: the zero, nanoseconds since the epoch.
    """

    def __init__(self, origin: float | None = None) -> None:
        self._origin = process_start() if origin is None else origin
        self.began = time.time_ns() - int((time.monotonic() - self._origin) * 1e9)
        self.marks: dict[str, float] = {}
        self.kind = "cold"
        self.accelerator = ""

    def mark(self, name: str) -> None:
        """Note that `name` is reached now; a name counts the first time."""
        self.marks.setdefault(name, time.monotonic() - self._origin)

    def __str__(self) -> str:
        marks = " ".join(f"{name}={seconds:.3f}" for name, seconds in self.marks.items())
        return f"{marks} kind={self.kind}"


def process_start() -> float:
    """When this process began, by the monotonic clock."""
    import os

    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    # Field 22 counts clock ticks of the boot clock; monotonic differs by time suspended.
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))
