# SPDX-License-Identifier: Apache-2.0
"""A running VM follows what its containers ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent.api import agent_pb2, oci_pb2
from shimv2.cgroups import CgroupError
from shimv2.guest_spec import resources_of
from shimv2.resources import (
    Demand,
    Size,
    demand_of,
    pod_demand,
    union,
    wanted_size,
    wanted_swap,
)
from shimv2.spec import ContainerKind
from vmm.errors import CapacityError, VmmError

if TYPE_CHECKING:
    from shimv2.config import Config
    from shimv2.guest import Guest
    from shimv2.placement import SandboxPlacement
    from shimv2.spec import Spec
    from shimv2.swap import GuestSwap

log = logging.getLogger("sandbox")


def workload(config: Config, spec: Spec) -> Demand | None:
    """What all containers of a sandbox are going to ask for; None where the VM follows them.

    Args:
        spec: of the sandbox.

    Raises:
        SpecError: its resources can't be read.
    """
    if not config.runtime.static_sandbox_resource_mgmt:
        return None
    demand = pod_demand(spec.annotations)  # also where the pod has no container of its own
    if demand is None and spec.kind is ContainerKind.SINGLE:
        demand = demand_of(resources_of(spec))
    return demand or Demand()


class Sizing:
    """Of one VM.

    Args:
        placement: where its vCPU threads go, and which CPUs of the host they may use.
        fixed: the size that it has for good.
    """

    def __init__(
        self, config: Config, guest: Guest, placement: SandboxPlacement, fixed: Size | None = None
    ) -> None:
        vm = guest.vm
        self._guest = guest
        self._placement = placement
        self._fixed = fixed
        self._own_cpus = max(config.hypervisor.default_vcpus, 0.0) or float(vm.config.vcpus)
        self._own_memory = vm.config.memory_mib
        self._size = Size(vm.config.vcpus, vm.config.memory_mib)
        self._most = Size(vm.config.max_vcpus, vm.config.max_memory_mib)
        self._demands: dict[str, Demand] = {}
        self._lock = trio.Lock()
        self._swap: GuestSwap | None = None
        if config.hypervisor.enable_guest_swap:
            from shimv2.swap import GuestSwap  # few starts need it

            self._swap = GuestSwap(Path(config.hypervisor.guest_swap_path), guest)

    async def settle(self) -> None:
        """A VM of a fixed size that was not made with it, since it is a clone, gets it now.

        Raises:
            CapacityError, VmmError, RpcError: it can't.
        """
        if self._fixed is not None:
            async with self._lock:
                await self._grow(self._fixed)

    async def add(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """Before the container is created.

        Raises:
            SpecError: the resources name CPUs that can't be.
            CapacityError, VmmError, RpcError: the VM can't have so much.
        """
        await self._change(container_id, demand_of(resources))

    async def update(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """Before the guest's cgroups change; `shrink` follows after.  Raises as `add`."""
        before = self._demands.get(container_id, Demand())
        await self._change(container_id, before.updated(resources))

    def forget(self, container_id: str) -> None:
        """It has ended: the next to come may have its share."""
        self._demands.pop(container_id, None)

    async def shrink(self) -> None:
        """Give back what nobody asks for any more; what can't be given back stays."""
        if self._fixed is not None:
            return
        async with self._lock:
            wanted = self._wanted(self._demands)
            able = self._guest.vm.capabilities
            try:
                if able.vcpu_unplug and wanted.vcpus < self._size.vcpus:
                    self._size = Size(
                        await self._guest.vm.resize_vcpus(wanted.vcpus), self._size.memory_mib
                    )
                if able.memory_unplug and wanted.memory_mib < self._size.memory_mib:
                    self._size = Size(
                        self._size.vcpus, await self._guest.vm.resize_memory(wanted.memory_mib)
                    )
            except VmmError as error:
                log.warning("what nobody needs was not unplugged: %s", error)
            self._confine(self._demands)

    async def _change(self, container_id: str, demand: Demand) -> None:
        async with self._lock:
            demands = {**self._demands, container_id: demand}
            if self._fixed is None:
                await self._grow(self._wanted(demands))
            if self._swap is not None:
                await self._swap.cover(wanted_swap(self._own_memory, demands.values()))
            self._confine(demands)
            self._demands[container_id] = demand  # of the others some may have ended meanwhile

    def _wanted(self, demands: dict[str, Demand]) -> Size:
        if not self._guest.vm.capabilities.memory_hotplug:
            # As much as there is, whatever the limits say.
            demands = {name: Demand(d.cpus, cpuset=d.cpuset) for name, d in demands.items()}
        return wanted_size(self._own_cpus, self._own_memory, demands.values(), self._most)

    async def _grow(self, wanted: Size) -> None:
        able = self._guest.vm.capabilities
        if able.memory_hotplug and wanted.memory_mib > self._size.memory_mib:
            await self._add_memory(wanted.memory_mib)
        if able.vcpu_hotplug and wanted.vcpus > self._size.vcpus:
            await self._add_vcpus(wanted.vcpus)

    async def _add_memory(self, mib: int) -> None:
        try:
            got = await self._guest.vm.resize_memory(mib)
        except CapacityError as error:
            raise CapacityError(f"memory for the sandbox's containers: {error}") from error
        self._size = Size(self._size.vcpus, got)
        await self._guest.call("OnlineCPUMem", agent_pb2.OnlineCPUMemRequest())

    async def _add_vcpus(self, count: int) -> None:
        got = await self._guest.vm.resize_vcpus(count)
        self._size = Size(got, self._size.memory_mib)
        await self._placement.add_vcpu_threads(await self._guest.vcpu_threads())
        request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=got, cpu_only=True)
        await self._guest.call("OnlineCPUMem", request)

    def _confine(self, demands: dict[str, Demand]) -> None:
        """Let the vCPUs run where the containers may: on the CPUs of all their cpusets."""
        cpus = union(demand.cpuset for demand in demands.values())
        nodes = union(demand.memory_nodes for demand in demands.values())
        try:
            self._placement.confine(cpus, nodes)
        except CgroupError as error:
            log.warning("the containers' cpusets do not hold on the host: %s", error)
