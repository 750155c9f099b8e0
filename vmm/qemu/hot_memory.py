# SPDX-License-Identifier: Apache-2.0
"""Memory that a running VM is given: by DIMMs, or by one virtio-mem device.

A DIMM takes a slot and stays.  virtio-mem (QEMU's docs/system/devices/virtio-mem.rst) is one
region as large as all that may ever be added; its ``requested-size`` says how much of it the
guest is to use, and the guest follows in both directions.  The device is plugged when memory is
first asked for, so that neither a boot nor a template has it.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from vmm.errors import CapacityError, VmmError
from vmm.hypervisor import VmConfig
from vmm.qemu import memory
from vmm.qemu.devices import pci_device
from vmm.qemu.pci import PciSlot
from vmm.qemu.qmp import Event
from vmm.qemu.qmp_client import QmpClient

PLUG_TIMEOUT = 30.0
"""Seconds QEMU has to realise a device; it tells vhost-user backends of the memory there."""
GROW_TIMEOUT = 20.0
"""Seconds the guest has to take what it was given."""

_GROW_PAUSE = 0.02

DEVICE_ID = "virtiomem0"
_DEVICE_PATH = f"/machine/peripheral/{DEVICE_ID}"
_BACKEND_ID = "virtiomem"
_STEP_MIB = 4  # a multiple of the device's block size, which is that of a huge page


class HotMemory:
    """Of one VM; its caller does one thing at a time."""

    def __init__(self, qmp: QmpClient, config: VmConfig) -> None:
        self._qmp = qmp
        self._config = config
        self._dimms = 0
        self._added = 0  # MiB in DIMMs
        self._device_is_there = False
        self._requested = 0  # MiB, of the device
        self._taken = 0  # MiB that the guest uses of it

    @property
    def size_mib(self) -> int:
        """What the guest has by now."""
        return self._config.memory_mib + self._added + self._taken

    def on_event(self, event: Event) -> None:
        """MEMORY_DEVICE_SIZE_CHANGE: the guest took memory, or gave some back."""
        if event.data.get("id") == DEVICE_ID:
            self._taken = int(event.data["size"]) >> 20

    async def resize(self, mib: int, take_place: Callable[[str], PciSlot]) -> int:
        """Bring the VM to at least `mib`, or with virtio-mem to that size; see `Hypervisor`.

        Args:
            take_place: finds a PCI slot for the device; it is called once.

        Raises:
            CapacityError: the VM can't have so much.
            VmmError: the guest did not take it.
        """
        if self._config.virtio_mem:
            return await self._resize_device(mib, take_place)
        now = self._config.memory_mib + self._added
        more = memory.growth(now, mib)
        if more == 0:
            return now
        self._check_limit(mib, now + more)
        if self._dimms >= self._config.memory_slots:
            raise CapacityError(f"no memory slot left: all {self._config.memory_slots} are taken")
        await self._add_dimm(more)
        return now + more

    def _check_limit(self, wanted: int, total: int) -> None:
        most = self._config.max_memory_mib
        if not memory.can_grow(self._config) or total > most:
            raise CapacityError(f"{wanted} MiB of memory asked for, this VM ends at {most} MiB")

    async def _add_dimm(self, mib: int) -> None:
        backend = f"mem{self._dimms}"
        await self._qmp.execute("object-add", memory.backend(backend, mib, self._config))
        name = f"{memory.DIMM_ID_PREFIX}{self._dimms}"
        await self._add_device({"driver": "pc-dimm", "id": name, "memdev": backend})
        self._dimms += 1
        self._added += mib

    async def _add_device(self, arguments: dict[str, object]) -> None:
        """A device on a memory object, which goes with it if it can't be."""
        try:
            await self._qmp.execute("device_add", arguments, timeout=PLUG_TIMEOUT)
        except VmmError:
            await self._qmp.execute("object-del", {"id": arguments["memdev"]})
            raise

    async def _resize_device(self, mib: int, take_place: Callable[[str], PciSlot]) -> int:
        own = self._config.memory_mib
        wanted = -(-max(0, mib - own) // _STEP_MIB) * _STEP_MIB
        if wanted == self._requested:
            return own + wanted
        grows = wanted > self._requested
        if grows and wanted > memory.virtio_mem_mib(self._config):
            self._check_limit(mib, own + wanted)
            raise CapacityError(
                f"{mib} MiB of memory asked for, this VM ends at"
                f" {own + memory.virtio_mem_mib(self._config)} MiB"
            )
        if not self._device_is_there:
            await self._plug_device(take_place)
        before = self._requested
        await self._request(wanted)
        if grows:
            with trio.move_on_after(GROW_TIMEOUT):
                while await self._ask_taken() < wanted:
                    await trio.sleep(_GROW_PAUSE)
            if (taken := self._taken) < wanted:
                await self._request(before)
                raise VmmError(
                    f"the guest took {taken} of {wanted} MiB of memory in {GROW_TIMEOUT:g} s"
                )
        return own + wanted

    async def _ask_taken(self) -> int:
        # Asked for: QEMU holds back all events of a second but the first.
        size = await self._qmp.execute("qom-get", {"path": _DEVICE_PATH, "property": "size"})
        self._taken = int(size) >> 20
        return self._taken

    async def _request(self, mib: int) -> None:
        await self._qmp.execute(
            "qom-set",
            {"path": _DEVICE_PATH, "property": "requested-size", "value": mib << 20},
        )
        self._requested = mib

    async def _plug_device(self, take_place: Callable[[str], PciSlot]) -> None:
        config = self._config
        backend = memory.backend(_BACKEND_ID, memory.virtio_mem_mib(config), config)
        prealloc = backend.pop("prealloc", False)
        if config.hugepages:  # the host sets pages aside only as they are used
            backend["reserve"] = False
        await self._qmp.execute("object-add", backend)
        device = pci_device("virtio-mem-pci", DEVICE_ID, take_place(DEVICE_ID), memdev=_BACKEND_ID)
        if prealloc:
            device["prealloc"] = True
        await self._add_device(device)
        self._device_is_there = True
