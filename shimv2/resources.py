# SPDX-License-Identifier: Apache-2.0
"""The VM's size: its own share (default_vcpus, default_memory) and what its containers ask for.

Pure arithmetic, no I/O.  CPUs stay fractions until the VMM is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from agent.api import oci_pb2
from vmm.errors import CapacityError

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Demand:
    """What one container asks for: `cpus`, as in 1.5, and `memory` in bytes; 0 for no limit."""

    cpus: float = 0.0
    memory: int = 0

    def updated(self, resources: oci_pb2.LinuxResources) -> Demand:
        """After an Update: what `resources` leaves out stays as it was."""
        cpus, memory = self.cpus, self.memory
        if resources.CPU.Quota and resources.CPU.Period:
            cpus = max(0.0, resources.CPU.Quota / resources.CPU.Period)
        elif resources.CPU.Quota < 0:
            cpus = 0.0
        if resources.Memory.Limit:
            memory = max(0, resources.Memory.Limit)
        return Demand(cpus, memory)


def demand_of(resources: oci_pb2.LinuxResources) -> Demand:
    """Of a container's spec; a quota counts only with its period."""
    return Demand().updated(resources)


@dataclass(frozen=True, slots=True)
class Size:
    """Of a VM: whole vCPUs, and MiB."""

    vcpus: int
    memory_mib: int


def wanted_size(own_cpus: float, own_mib: int, demands: Iterable[Demand], most: Size) -> Size:
    """The size for these containers.

    More CPUs than the VM can have are cut to its maximum, as Kata does: a quota above the
    number of processors is valid.  Memory that is not there can't be promised.

    Raises:
        CapacityError: the limits' sum is above the VM's maximum.
    """
    demands = list(demands)
    # Rounded first: 0.1 + 0.2 CPUs and the like shall not cost a further vCPU.
    vcpus = math.ceil(round(own_cpus + sum(demand.cpus for demand in demands), 6))
    limits = sum(demand.memory for demand in demands)
    memory = own_mib + limits // _MIB
    if memory > most.memory_mib:
        raise CapacityError(
            f"memory limits of the sandbox's containers: {limits // _MIB} MiB, with default_memory"
            f" = {own_mib} MiB for the VM itself that is {memory} MiB; default_maxmemory and this"
            f" host allow {most.memory_mib} MiB"
        )
    return Size(min(max(1, vcpus), most.vcpus), memory)
