# SPDX-License-Identifier: Apache-2.0
"""The VM's size: its own share (default_vcpus, default_memory) and what its containers ask for.

Pure arithmetic, no I/O.  CPUs stay fractions until the VMM is asked.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.api import oci_pb2
from shimv2.api import cri_pb2
from shimv2.spec import SpecError
from vmm.errors import CapacityError

log = logging.getLogger("sandbox")

_MIB = 1 << 20
_MOST_CPUS = 8192  # Linux' CONFIG_NR_CPUS ends there
_SHARES_OF_A_CPU = 1024

# What containerd's CRI plugin says of a whole pod.
_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
_SHARES = "io.kubernetes.cri.sandbox-cpu-shares"
_MEMORY = "io.kubernetes.cri.sandbox-memory"
# And CRI-O: CRI's LinuxContainerResources as JSON, under its newer and its older name.
_CRIO = ("pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources")


@dataclass(frozen=True, slots=True)
class Demand:
    """What one container asks for.

    Attributes:
        cpus: as in 1.5; 0 for no quota.
        memory: limit in bytes, 0 for none.
        hugepages: sum of its limits of all page sizes, in bytes.
        cpuset, memory_nodes: of the host, "" for any; as the kernel writes lists ("0-3,8").
        swap: limit of memory and swap together, in bytes, 0 for none.
        swappiness: above 0 it wants swap space.
    """

    cpus: float = 0.0
    memory: int = 0
    hugepages: int = 0
    cpuset: str = ""
    memory_nodes: str = ""
    swap: int = 0
    swappiness: int = 0

    def updated(self, resources: oci_pb2.LinuxResources) -> Demand:
        """After an Update: what `resources` leaves out stays as it was.

        Raises:
            SpecError: a cpuset is no list of numbers.
        """
        cpus, memory, hugepages = self.cpus, self.memory, self.hugepages
        if resources.CPU.Quota and resources.CPU.Period:
            cpus = max(0.0, resources.CPU.Quota / resources.CPU.Period)
        elif resources.CPU.Quota < 0:
            cpus = 0.0
        if resources.Memory.Limit:
            memory = max(0, resources.Memory.Limit)
        if resources.HugepageLimits:
            hugepages = sum(limit.Limit for limit in resources.HugepageLimits)
        for name, text in (("cpus", resources.CPU.Cpus), ("mems", resources.CPU.Mems)):
            numbers(text, f"resources.cpu.{name}")
        return Demand(
            cpus,
            memory,
            hugepages,
            resources.CPU.Cpus or self.cpuset,
            resources.CPU.Mems or self.memory_nodes,
            max(0, resources.Memory.Swap) or self.swap,
            resources.Memory.Swappiness or self.swappiness,
        )


def demand_of(resources: oci_pb2.LinuxResources) -> Demand:
    """Of a container's spec; a quota counts only with its period.  Raises SpecError."""
    return Demand().updated(resources)


def pod_demand(annotations: Mapping[str, str]) -> Demand | None:
    """What the engine says that all containers of a pod to come ask for; None if it says
    nothing.  A value that can't be read counts as 0, as in Kata."""
    for name in _CRIO:
        if name in annotations:
            return _pod_demand_of_crio(name, annotations[name])
    if not any(name in annotations for name in (_QUOTA, _PERIOD, _SHARES, _MEMORY)):
        return None
    quota, period, shares, memory = (
        _whole(annotations.get(name, "0"), name) for name in (_QUOTA, _PERIOD, _SHARES, _MEMORY)
    )
    return _pod_demand(quota, period, shares, memory)


def pod_annotations(resources: cri_pb2.LinuxContainerResources) -> dict[str, str]:
    """As containerd's CRI plugin gives a pod's resources to a sandbox that has a container."""
    return {
        _QUOTA: str(resources.cpu_quota),
        _PERIOD: str(resources.cpu_period),
        _SHARES: str(resources.cpu_shares),
        _MEMORY: str(resources.memory_limit_in_bytes),
    }


def _pod_demand_of_crio(name: str, text: str) -> Demand:
    try:
        said = json.loads(text)
        values = [
            int(said.get(key) or 0)
            for key in ("cpu_quota", "cpu_period", "cpu_shares", "memory_limit_in_bytes")
        ]
    except (ValueError, TypeError, AttributeError, RecursionError):
        log.warning(
            "annotation %s = %.80r is not CRI's resources: it counts as nothing", name, text
        )
        return Demand()
    return _pod_demand(*values)


def _pod_demand(quota: int, period: int, shares: int, memory: int) -> Demand:
    cpus = 0.0
    if quota > 0 and period > 0:
        cpus = quota / period
    elif quota < 0 < shares:  # no limit: as many as it was promised
        cpus = float(-(-shares // _SHARES_OF_A_CPU))
    return Demand(cpus, max(0, memory))


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        log.warning("annotation %s = %.80r is not a whole number: it counts as 0", name, text)
        return 0


def numbers(text: str, name: str) -> frozenset[int]:
    """A list as the kernel writes it, ``0-2,5``; `name` is for the error.

    Raises:
        SpecError: it is none.
    """
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise SpecError(f"{name}: must be a list like 0-2,5, is {text[:80]!r}")
        low, high = int(first), int(last or first)
        if not low <= high < _MOST_CPUS:
            raise SpecError(
                f"{name}: {part} in {text[:80]!r} is not between 0 and {_MOST_CPUS - 1}"
            )
        found.update(range(low, high + 1))
    return frozenset(found)


def union(lists: Iterable[str]) -> str:
    """All of these lists in one; "" if one of them is (it allows everything)."""
    lists = list(lists)
    if not lists or not all(lists):
        return ""
    return ",".join(map(str, sorted(frozenset().union(*(numbers(text, "list") for text in lists)))))


def wanted_swap(own_mib: int, demands: Iterable[Demand]) -> int:
    """Bytes of swap space for these containers; `own_mib` once for all that set no limit."""
    total = 0
    unlimited = False
    for demand in demands:
        if not demand.swappiness:
            continue
        if demand.swap:
            total += max(0, demand.swap - demand.memory)
        elif demand.memory:
            total += demand.memory
        else:
            unlimited = True
    return total + own_mib * _MIB * unlimited


@dataclass(frozen=True, slots=True)
class Size:
    """Of a VM: whole vCPUs, and MiB."""

    vcpus: int
    memory_mib: int


def wanted_size(own_cpus: float, own_mib: int, demands: Iterable[Demand], most: Size) -> Size:
    """The size for these containers.

    More CPUs than the VM can have are cut to its maximum, as Kata does: a quota above the
    number of processors is valid.  Without any quota the CPUs of the cpusets count.  Memory that
    is not there can't be promised.

    Raises:
        CapacityError: the limits' sum is above the VM's maximum.
    """
    demands = list(demands)
    cpus = sum(demand.cpus for demand in demands)
    if not cpus:
        cpus = len(frozenset().union(*(numbers(demand.cpuset, "cpus") for demand in demands)))
    # Rounded first: 0.1 + 0.2 CPUs and the like shall not cost a further vCPU.
    vcpus = math.ceil(round(own_cpus + cpus, 6))
    limits = sum(demand.memory + demand.hugepages for demand in demands)
    memory = own_mib + limits // _MIB
    if memory > most.memory_mib:
        raise CapacityError(
            f"memory limits of the sandbox's containers: {limits // _MIB} MiB, with default_memory"
            f" = {own_mib} MiB for the VM itself that is {memory} MiB; default_maxmemory and this"
            f" host allow {most.memory_mib} MiB"
        )
    return Size(min(max(1, vcpus), most.vcpus), memory)
