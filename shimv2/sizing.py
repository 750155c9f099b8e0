# SPDX-License-Identifier: Apache-2.0
"""A running VM follows what its containers ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio

from agent.api import agent_pb2, oci_pb2
from shimv2.config import Config
from shimv2.guest import Guest
from shimv2.resources import Demand, Size, demand_of, wanted_size
from vmm.errors import CapacityError, VmmError

log = logging.getLogger("sandbox")


class Sizing:
    """Of one VM.

    Args:
        place_threads: puts vCPU threads, by their ids, into the sandbox's cgroup.
    """

    def __init__(
        self, config: Config, guest: Guest, place_threads: Callable[[Iterable[int]], None]
    ) -> None:
        vm = guest.vm
        self._guest = guest
        self._place_threads = place_threads
        self._own_cpus = max(config.hypervisor.default_vcpus, 0.0) or float(vm.config.vcpus)
        self._own_memory = vm.config.memory_mib
        self._size = Size(vm.config.vcpus, vm.config.memory_mib)
        able = vm.capabilities
        dynamic = not config.runtime.static_sandbox_resource_mgmt
        self._cpus_move = dynamic and able.vcpu_hotplug
        self._memory_moves = dynamic and able.memory_hotplug
        self._most = Size(vm.config.max_vcpus, vm.config.max_memory_mib)
        self._demands: dict[str, Demand] = {}
        self._lock = trio.Lock()

    async def add(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """Before the container is created.  Raises CapacityError, VmmError, RpcError."""
        await self._change(container_id, demand_of(resources))

    async def update(self, container_id: str, resources: oci_pb2.LinuxResources) -> None:
        """Before the guest's cgroups change.  Raises as `add`."""
        before = self._demands.get(container_id, Demand())
        await self._change(container_id, before.updated(resources))

    def forget(self, container_id: str) -> None:
        """It has ended: the next to come may have its share."""
        self._demands.pop(container_id, None)

    async def shrink(self) -> None:
        """Give back the vCPUs that nobody asks for any more; the rest goes on if that fails."""
        async with self._lock:
            if not self._guest.vm.capabilities.vcpu_unplug:
                return
            try:
                await self._set_vcpus(self._wanted(self._demands).vcpus)
            except VmmError as error:
                log.warning("vCPUs that nobody needs were not unplugged: %s", error)

    async def _change(self, container_id: str, demand: Demand) -> None:
        async with self._lock:
            demands = {**self._demands, container_id: demand}
            size = self._wanted(demands)
            await self._set_memory(size.memory_mib)
            await self._set_vcpus(size.vcpus)
            self._demands = demands

    def _wanted(self, demands: dict[str, Demand]) -> Size:
        if not self._memory_moves:  # as much as there is, whatever the limits say
            demands = {name: Demand(demand.cpus) for name, demand in demands.items()}
        return wanted_size(self._own_cpus, self._own_memory, demands.values(), self._most)

    async def _set_memory(self, mib: int) -> None:
        if not self._memory_moves or mib <= self._size.memory_mib:
            return
        try:
            got = await self._guest.vm.resize_memory(mib)
        except CapacityError as error:
            raise CapacityError(f"memory for the sandbox's containers: {error}") from error
        self._size = Size(self._size.vcpus, got)
        await self._guest.call("OnlineCPUMem", agent_pb2.OnlineCPUMemRequest())

    async def _set_vcpus(self, count: int) -> None:
        before = self._size.vcpus
        if not self._cpus_move or count == before:
            return
        got = await self._guest.vm.resize_vcpus(count)
        self._size = Size(got, self._size.memory_mib)
        if got > before:
            self._place_threads(await self._guest.vcpu_threads())
            request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=got, cpu_only=True)
            await self._guest.call("OnlineCPUMem", request)
