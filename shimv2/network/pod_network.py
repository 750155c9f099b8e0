# SPDX-License-Identifier: Apache-2.0
"""The interfaces of a pod: found in its namespace, given to the VM, and followed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import trio
from google.protobuf.message import Message

from agent.api import agent_pb2
from shimv2.network import netlink as nl
from shimv2.network import to_agent
from shimv2.network.namespace import PodNamespace, Wire
from shimv2.network.snapshot import Link, Snapshot
from shimv2.network.tap import MAX_QUEUES, open_vhost_net
from shimv2.network.traces import Trace
from ttrpc.errors import RpcError
from vmm.errors import VmmError
from vmm.hypervisor import Device, DeviceAddress, NetDevice

log = logging.getLogger("network")

_QUIET = 0.05  # seconds without news that end a burst of changes
_BURST = 1.0  # seconds that a burst may delay the news at the most
_AGAIN = 2.0  # seconds until what failed is tried once more
_TRIES = 3


class VirtualMachine(Protocol):
    """What is needed of the guest."""

    async def add_device(self, device: Device) -> DeviceAddress: ...

    async def remove_device(self, device_id: str) -> None: ...

    async def call(self, method: str, request: Message) -> Any: ...


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Of the configuration.

    Attributes:
        model: "tcfilter", "macvtap", or "none" for a guest with loopback only.
        queues: queue pairs of each NIC.
        vhost: use the kernel's vhost-net where it exists.
        inbound, outbound: limits of the VM's traffic in bits per second, 0 for none.
    """

    model: str = "tcfilter"
    queues: int = 1
    vhost: bool = True
    inbound: int = 0
    outbound: int = 0


@dataclass(slots=True)
class _Nic:
    link: Link
    wire: Wire
    device_id: str
    address: DeviceAddress


class PodNetwork:
    """See the package's docstring for the order of calls.

    Leaving the ``async with`` block leaves the namespace as it was found; the VM has to be
    gone by then, or about to go.

    Args:
        fd: of the pod's network namespace; stays the caller's.
        on_traces: told what stands in the namespace because of us, whenever that changes.
    """

    def __init__(
        self,
        fd: int,
        settings: NetworkSettings,
        on_traces: Callable[[list[Trace]], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._on_traces = on_traces
        self._namespace = PodNamespace(fd)
        self._monitor: socket.socket
        self._stack = contextlib.ExitStack()
        self._lock = trio.Lock()  # for the namespace, the NICs and what the guest was told
        self._nics: dict[int, _Nic] = {}  # by the index of the link in the namespace
        self._told = Snapshot()
        self._number = 0

    async def __aenter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._namespace)
            # Opened before the first look, so that nothing is missed in between.
            self._monitor = stack.enter_context(self._namespace.monitor())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True), self._stack:
            await trio.to_thread.run_sync(self._cut_all)
            self._tell_traces()

    async def plug(self, vm: VirtualMachine) -> None:
        """Give the running VM a NIC for each interface; its guest may still be booting.

        Raises:
            OSError, VmmError: an interface could not be given to the VM.
        """
        async with self._lock:
            await self._plug_missing(vm, (await self._look()).links)

    async def configure(self, vm: VirtualMachine) -> None:
        """Make the guest's network what the namespace's is now.

        Raises:
            OSError, VmmError, RpcError: it could not be.
        """
        async with self._lock:
            found = await self._look()
            if found == self._told:
                return
            await self._unplug_vanished(vm, found)
            await self._plug_missing(vm, found.links)
            await self._tell(vm, found)

    async def follow(self, vm: VirtualMachine) -> None:
        """Whenever the namespace changes, `configure`; never returns, and logs what fails."""
        failures = 0
        while True:
            with trio.move_on_after(_AGAIN if 0 < failures < _TRIES else math.inf):
                await trio.lowlevel.wait_readable(self._monitor)
                failures = 0
                await self._quiet()
            try:
                await self.configure(vm)
                failures = 0
            except (OSError, VmmError, RpcError) as error:
                failures += 1
                log.warning("a change of the pod's network did not reach the guest: %s", error)

    # --- inside -------------------------------------------------------------------------

    async def _quiet(self) -> None:
        """Until a burst of changes is over."""
        with trio.move_on_after(_BURST):
            while True:
                nl.drain(self._monitor)
                with trio.move_on_after(_QUIET) as quiet:
                    await trio.lowlevel.wait_readable(self._monitor)
                if quiet.cancelled_caught:
                    return

    async def _look(self) -> Snapshot:
        if self._settings.model == "none":
            return Snapshot()
        found = await trio.to_thread.run_sync(self._namespace.snapshot)
        return found.wired(kept=self._nics, ours={nic.wire.tap for nic in self._nics.values()})

    async def _plug_missing(self, vm: VirtualMachine, links: tuple[Link, ...]) -> None:
        for link in links:
            if link.index not in self._nics:
                self._nics[link.index] = await self._plug_one(vm, link)
                self._tell_traces()

    async def _plug_one(self, vm: VirtualMachine, link: Link) -> _Nic:
        wire = await trio.to_thread.run_sync(self._attach, link)
        try:
            vhost = open_vhost_net(len(wire.fds)) if self._settings.vhost else []
            try:
                self._number += 1
                device = NetDevice(
                    id=f"net{self._number}",
                    mac=link.mac,
                    tap_fds=tuple(wire.fds),
                    vhost_fds=tuple(vhost),
                )
                address = await vm.add_device(device)
            finally:
                for fd in vhost:
                    os.close(fd)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(wire.cut)
            raise
        wire.close_fds()
        log.info("interface %s (%s, %s) is in the VM", link.name, link.kind or "device", link.mac)
        return _Nic(link, wire, device.id, address)

    def _attach(self, link: Link) -> Wire:
        queues = min(max(1, self._settings.queues), MAX_QUEUES)
        if self._settings.model == "macvtap":
            wire = self._namespace.attach_macvtap(link, queues)
        else:
            wire = self._namespace.attach_tap(link, queues)
        try:
            wire.limit(inbound=self._settings.inbound, outbound=self._settings.outbound)
        except BaseException:
            wire.cut()
            raise
        return wire

    async def _unplug_vanished(self, vm: VirtualMachine, found: Snapshot) -> None:
        present = {link.index: link for link in found.links}
        for index, nic in list(self._nics.items()):
            link = present.get(index)
            if link is not None and link.mac == nic.link.mac:
                continue
            del self._nics[index]
            await trio.to_thread.run_sync(nic.wire.cut)
            self._tell_traces()
            await vm.remove_device(nic.device_id)
            log.info("interface %s has left the pod", nic.link.name)

    async def _tell(self, vm: VirtualMachine, found: Snapshot) -> None:
        before = {link.index: link for link in self._told.links}
        for link in found.links:
            nic = self._nics[link.index]
            if link.mtu != nic.link.mtu:
                await trio.to_thread.run_sync(nic.wire.set_mtu, link.mtu)
            nic.link = link
            addresses = found.addresses_of(link.index)
            if before.get(link.index) == link and addresses == self._told.addresses_of(link.index):
                continue
            message = to_agent.interface(link, found, nic.address.pci_path)
            await vm.call("UpdateInterface", agent_pb2.UpdateInterfaceRequest(interface=message))
        # Routes go with an address or a link; the agent compares before it changes any.
        await vm.call("UpdateRoutes", agent_pb2.UpdateRoutesRequest(routes=to_agent.routes(found)))
        if found.neighbours and found.neighbours != self._told.neighbours:
            request = agent_pb2.AddARPNeighborsRequest(neighbors=to_agent.neighbours(found))
            await vm.call("AddARPNeighbors", request)
        self._told = found

    def _tell_traces(self) -> None:
        self._on_traces([trace for nic in self._nics.values() for trace in nic.wire.traces])

    def _cut_all(self) -> None:
        for nic in self._nics.values():
            try:
                nic.wire.cut()
            except OSError as error:
                log.warning("left behind in the pod's network namespace: %s", error)
        self._nics.clear()
