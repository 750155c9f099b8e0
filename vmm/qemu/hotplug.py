# SPDX-License-Identifier: Apache-2.0
"""Changing a running VM over QMP: devices, vCPUs, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from vmm.errors import UnsupportedError, VmmConfigError, VmmError, VmmGoneError
from vmm.hypervisor import VmConfig
from vmm.qemu import pci
from vmm.qemu.devices import Parts
from vmm.qemu.hot_memory import PLUG_TIMEOUT, HotMemory
from vmm.qemu.qmp import Event
from vmm.qemu.qmp_client import QmpClient, QmpError

UNPLUG_TIMEOUT = 10.0
"""Seconds the guest has to let a device go."""


def fd_name(fd: int) -> str:
    """The name under which `fd` is sent to QEMU by ``getfd``."""
    return f"fd-{fd}"


class Plugger:
    """Adds and removes, one thing at a time; what fails halfway is taken back."""

    def __init__(self, qmp: QmpClient, config: VmConfig) -> None:
        self._qmp = qmp
        self._lock = trio.Lock()
        self._plugged: dict[str, Parts] = {}
        self._unplugging: dict[str, _Unplug] = {}
        self._gone = False
        self._memory = HotMemory(qmp, config)

    def register(self, device_id: str, parts: Parts) -> None:
        """A device that is there since the boot."""
        self._plugged[device_id] = parts

    def on_event(self, event: Event) -> None:
        """Wake whoever waits for an unplug to end, or note what the guest did with memory."""
        if event.name == "MEMORY_DEVICE_SIZE_CHANGE":
            self._memory.on_event(event)
            return
        unplug = self._unplugging.get(str(event.data.get("device", "")))
        if unplug is None:
            return
        if event.name == "DEVICE_DELETED":
            unplug.done = True
            unplug.event.set()
        elif event.name in ("DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"):
            unplug.event.set()

    def vm_gone(self) -> None:
        """Nobody needs to wait any longer."""
        self._gone = True
        for unplug in self._unplugging.values():
            unplug.event.set()

    async def plug(self, device_id: str, parts: Parts) -> None:
        """Create a device with all it stands on.

        Raises:
            VmmError: QEMU refused a part; those made before are gone again.
        """
        async with self._lock:
            undo: list[tuple[str, dict[str, Any]]] = []
            try:
                await self._create(parts, undo)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._take_back(undo)
                raise
            self._plugged[device_id] = parts

    async def unplug(self, device_id: str) -> None:
        """Ask the guest to let go, wait until it has, and remove what the device stood on.

        Raises:
            VmmConfigError: no such device.
            UnsupportedError: it was there at boot.
            VmmError: the guest refused, or did not answer in time; the device is still there.
        """
        async with self._lock:
            parts = self._plugged.get(device_id)
            if parts is None:
                raise VmmConfigError(f"there is no device {device_id!r} in this VM")
            if parts.device["bus"] == pci.ROOT_BUS:
                raise UnsupportedError(
                    f"device {device_id!r} was there at boot, on the root bus: it stays"
                )
            if not await self._delete_device(parts.device["id"], UNPLUG_TIMEOUT):
                if self._gone:
                    raise VmmGoneError(f"the VM ended before it released device {device_id!r}")
                raise VmmError(
                    f"the guest did not release device {device_id!r} within {UNPLUG_TIMEOUT:g} s"
                )
            del self._plugged[device_id]
            await self._take_back(_undo_of(parts))

    async def resize_disk(self, device_id: str, size: int) -> None:
        """Raises:
        VmmConfigError: no such disk.
        """
        async with self._lock:
            parts = self._plugged.get(device_id)
            if parts is None or "drive" not in parts.device:
                raise VmmConfigError(f"there is no disk {device_id!r} in this VM")
            arguments = {"node-name": parts.device["drive"], "size": size}
            await self._qmp.execute("block_resize", arguments)

    async def resize_vcpus(self, count: int) -> int:
        """Plug or unplug vCPUs, those of the boot excepted; returns how many there are then."""
        async with self._lock:
            slots = await self._qmp.execute("query-hotpluggable-cpus")
            present = [slot for slot in slots if "qom-path" in slot]
            free = [slot for slot in slots if "qom-path" not in slot]
            free.sort(key=lambda slot: tuple(sorted(slot["props"].items())))
            now = len(present)
            for slot in free[: max(0, count - now)]:
                await self._qmp.execute(
                    "device_add", {"driver": slot["type"], "id": f"cpu-{now}", **slot["props"]}
                )
                now += 1
            while now > count:
                name = f"cpu-{now - 1}"
                if not any(slot["qom-path"].endswith(f"/{name}") for slot in present):
                    break  # there since the boot: it stays
                if not await self._delete_device(name, UNPLUG_TIMEOUT):
                    break
                now -= 1
            return now

    async def resize_memory(self, mib: int, take_place: Callable[[str], pci.PciSlot]) -> int:
        """See `HotMemory.resize`."""
        async with self._lock:
            return await self._memory.resize(mib, take_place)

    @property
    def memory_mib(self) -> int:
        """What the guest has by now."""
        return self._memory.size_mib

    async def _create(self, parts: Parts, undo: list[tuple[str, dict[str, Any]]]) -> None:
        for item in parts.objects:
            await self._qmp.execute("object-add", item)
            undo.append(("object-del", {"id": item["id"]}))
        for node in parts.blockdevs:
            await self._qmp.execute("blockdev-add", node)
            undo.append(("blockdev-del", {"node-name": node["node-name"]}))
        for fd in parts.device_fds:
            await self._send_fd(fd)
        for chardev in parts.chardevs:
            if chardev.fd is not None:
                await self._send_fd(chardev.fd)
            await self._qmp.execute("chardev-add", chardev.arguments(fd_name))
            undo.append(("chardev-remove", {"id": chardev.id}))
        for netdev in parts.netdevs:
            for fd in (*netdev.tap_fds, *netdev.vhost_fds):
                await self._send_fd(fd)
            await self._qmp.execute("netdev_add", netdev.arguments(fd_name))
            undo.append(("netdev_del", {"id": netdev.id}))
        await self._qmp.execute("device_add", parts.device, timeout=PLUG_TIMEOUT)

    async def _send_fd(self, fd: int) -> None:
        await self._qmp.execute("getfd", {"fdname": fd_name(fd)}, fds=(fd,))

    async def _take_back(self, undo: list[tuple[str, dict[str, Any]]]) -> None:
        for command, arguments in reversed(undo):
            try:
                await self._qmp.execute(command, arguments)
            except VmmError:
                continue  # what failed first is what the caller has to hear

    async def _delete_device(self, name: str, timeout: float) -> bool:
        unplug = self._unplugging[name] = _Unplug()
        try:
            with trio.move_on_after(timeout):
                try:
                    await self._qmp.execute("device_del", {"id": name})
                except QmpError as error:
                    if error.error_class == "DeviceNotFound":
                        return True
                    raise
                await unplug.event.wait()
        finally:
            del self._unplugging[name]
        return unplug.done


def _undo_of(parts: Parts) -> list[tuple[str, dict[str, Any]]]:
    undo = [("object-del", {"id": item["id"]}) for item in parts.objects]
    undo += [("blockdev-del", {"node-name": node["node-name"]}) for node in parts.blockdevs]
    undo += [("chardev-remove", {"id": chardev.id}) for chardev in parts.chardevs]
    undo += [("netdev_del", {"id": netdev.id}) for netdev in parts.netdevs]
    return undo


class _Unplug:
    __slots__ = ("done", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.done = False
