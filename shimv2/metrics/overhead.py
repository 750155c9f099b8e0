# SPDX-License-Identifier: Apache-2.0
"""What a pod costs beside its containers: the host's figures of a sandbox minus the guest's.

CPU is that of the time between two scrapes, so that nobody has to wait for a sample; with the
first scrape of a VM there is none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from agent.api import agent_pb2
from shimv2.metrics.exposition import Page
from ttrpc.errors import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shimv2.guest import Guest


@dataclass(slots=True)
class Snapshot:
    """One moment.

    Attributes:
        at: seconds of the monotonic clock.
        host_cpu: seconds that the sandbox's processes have used.
        guest_cpu: the same of each container, as its guest counts it.
        guest_memory: bytes of all containers.
    """

    at: float
    host_cpu: float
    guest_cpu: dict[str, float] = field(default_factory=dict)
    guest_memory: int = 0


_before: WeakKeyDictionary[Guest, Snapshot] = WeakKeyDictionary()


async def snapshot(guest: Guest, containers: Iterable[str], host_cpu: float) -> Snapshot:
    """Ask the guest for each of its containers.

    Raises:
        RpcError: it does not answer.
    """
    now = Snapshot(time.monotonic(), host_cpu)
    for container_id in containers:
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        try:
            stats = (await guest.call("StatsContainer", request)).cgroup_stats
        except RpcError as error:
            if error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
                raise
            continue  # the agent does not know it: a pause container, or one that has just ended
        now.guest_cpu[container_id] = stats.cpu_stats.cpu_usage.total_usage / 1e9
        now.guest_memory += stats.memory_stats.usage.usage
    return now


def add_overhead(page: Page, guest: Guest, now: Snapshot, host_memory: int) -> None:
    """The two families; the next call's CPU counts from `now` on."""
    before = _before.get(guest)
    _before[guest] = now
    page.value(
        "kata_shim_pod_overhead_memory_in_bytes",
        "Memory of the sandbox's processes (PSS) minus that of its containers.",
        max(0, host_memory - now.guest_memory),
    )
    if before is not None and now.at > before.at:
        guest_cpu = sum(
            max(0.0, used - before.guest_cpu.get(name, 0.0)) for name, used in now.guest_cpu.items()
        )
        spent = now.host_cpu - before.host_cpu - guest_cpu
        page.value(
            "kata_shim_pod_overhead_cpu",
            "CPU of the sandbox's processes minus that of its containers since the last scrape, "
            "in percent of one CPU.",
            max(0.0, 100 * spent / (now.at - before.at)),
        )
