# SPDX-License-Identifier: Apache-2.0
"""A start's marks as phases, one after the other on one clock."""

from __future__ import annotations

from dataclasses import dataclass

from .history import BootRecord

#: Mark that ends the phase → its name, who works in it, what it is (after a cold boot).
_PHASES = {
    "imported": ("shim", "host", "shim process, imports"),
    "prepared": ("prepare", "host", "vsock, virtiofsd, VMM prepared"),
    "vmm-started": ("vmm", "host", "VMM launched"),
    "driver-up": ("kernel", "guest", "firmware, kernel"),
    "agent-answers": ("agent", "guest", "agent"),
    "sandbox-created": ("sandbox", "pod", "sandbox set up"),
    "network": ("network", "pod", "network set up"),
    "container-created": ("create", "pod", "container created"),
    "container-started": ("start", "pod", "container started"),
}
#: What the same marks mean where the guest had been booted before.
_OF_CLONES = {
    "template": {
        "prepared": "VM restored from template",
        "vmm-started": "devices plugged, resumed",
        "driver-up": "vsock driver",
    },
    "cache": {
        "prepared": "VM taken from the cache",
        "vmm-started": "devices plugged, resumed",
        "driver-up": "vsock driver",
    },
}
#: Reached beside the others: they end no phase.
ASIDE = {"rootfs-shared": "root file system shared", "streams-open": "stdio streams open"}


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of a start; times in seconds after the shim process began.

    Attributes:
        name: for machines, the same however the VM started.
        side: who works: ``host``, ``guest``, or ``pod`` (host and guest).
        title: for people.
    """

    name: str
    side: str
    title: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def phases(record: BootRecord) -> list[Phase]:
    """In the order in which they ended; together they leave no gap.

    Without a mark of the driver (neither vhost-vsock nor a serial port shows it) kernel and
    agent are one phase, called ``boot``.  The agent is there when it has answered: a serial
    port can be connected to long before.
    """
    found: list[Phase] = []
    begin = 0.0
    clones = _OF_CLONES.get(record.kind, {})
    for mark, end in sorted(record.marks.items(), key=lambda item: item[1]):
        if mark not in _PHASES:
            continue
        name, side, title = _PHASES[mark]
        title = clones.get(mark, title)
        if mark == "agent-answers" and "driver-up" not in record.marks:
            name = "boot"
            title = "agent" if clones else "firmware, kernel, agent"
        found.append(Phase(name, side, title, begin, end))
        begin = end
    return found


def total(record: BootRecord) -> float:
    """Seconds from the shim process to the container's start."""
    return max((phase.end for phase in phases(record)), default=0.0)
