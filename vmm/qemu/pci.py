# SPDX-License-Identifier: Apache-2.0
"""Which PCI slot each device gets on q35.

Fixed, so that a guest always finds the same things in the same places and a snapshot fits
the machine that loads it:

=========  ==================================================================
slot       what is there
=========  ==================================================================
0x01       root disk
0x02       pci-bridge-0: 30 slots for hot-plugged disks, NICs and the rest, and for what
           finds no port
0x02/0x1f  virtio-serial (console and named ports), on the bridge
0x04-0x07  pcie-root-ports, one device each: hot-plugged virtio-fs and vsock
0x08-0x1d  devices that are there at boot, in the order they were added
0x1e       pvpanic, by which a kernel panic is told from a reboot
0x1f       the chipset's own
=========  ==================================================================

The serial controller makes the guest give the bridge its memory windows, 1 MiB each: Linux
assigns none to a bridge with nothing behind it, and disks plugged later would find no room
(SeaBIOS leaves windows there, the faster qboot does not).

A path is written as Kata's agents read it: slots in two hex digits from the root bus down,
``02/01`` for slot 1 of the bridge, ``04/00`` for the device of the first root port.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmm.errors import CapacityError
from vmm.hypervisor import Device, FsDevice, VsockDevice

ROOT_BUS = "pcie.0"
BRIDGE_ID = "pci-bridge-0"
BRIDGE_SLOT = 0x02
ROOT_DISK_SLOT = 0x01
PORT_SLOTS = range(0x04, 0x08)
BOOT_SLOTS = range(0x08, 0x1E)
PANIC_SLOT = 0x1E
BRIDGE_SLOTS = range(0x01, 0x1F)


@dataclass(frozen=True, slots=True)
class PciSlot:
    """One place: the QEMU bus, the slot on it, and the path the guest sees."""

    bus: str
    slot: int
    path: str

    @property
    def address(self) -> str:
        """As QEMU's ``addr=`` wants it."""
        return f"{self.slot:#x}"


def root_slot(slot: int) -> PciSlot:
    """A fixed slot of the root bus."""
    return PciSlot(ROOT_BUS, slot, f"{slot:02x}")


def bridge_slot(slot: int) -> PciSlot:
    """A slot of the bridge."""
    return PciSlot(BRIDGE_ID, slot, f"{BRIDGE_SLOT:02x}/{slot:02x}")


SERIAL_PLACE = bridge_slot(0x1F)


def port_id(index: int) -> str:
    return f"rp{index}"


def ports_for(boot_devices: Iterable[Device]) -> int:
    """A port for each kind of device that goes there and is not part of the boot.

    No more: an empty one costs an emulated boot 25 ms.
    """
    kinds = {type(device) for device in boot_devices}
    return sum(kind not in kinds for kind in (FsDevice, VsockDevice))


class PciLayout:
    """Who sits where.  `root_ports` is decided before the VM starts and then fixed."""

    def __init__(self) -> None:
        self.root_ports = 0
        self._taken: dict[str, PciSlot] = {}

    def take_boot_slot(self, device_id: str) -> PciSlot:
        """A slot of the root bus, or of the bridge once that is full.

        Raises:
            CapacityError: both are.
        """
        for slot in BOOT_SLOTS:
            if self._is_free(place := root_slot(slot)):
                return self._take(device_id, place)
        return self.take_bridge_slot(device_id)

    def take_bridge_slot(self, device_id: str) -> PciSlot:
        """A slot of the bridge.

        Raises:
            CapacityError: all 30 are taken.
        """
        for slot in BRIDGE_SLOTS:
            if self._is_free(place := bridge_slot(slot)):
                return self._take(device_id, place)
        raise CapacityError(
            f"no PCI slot left for {device_id}: all {len(BRIDGE_SLOTS)} of the bridge are taken"
        )

    def take_port(self, device_id: str) -> PciSlot:
        """The only slot below a free root port, or one of the bridge where there is none.

        Raises:
            CapacityError: all are taken.
        """
        for index in range(self.root_ports):
            place = PciSlot(port_id(index), 0, f"{PORT_SLOTS[index]:02x}/00")
            if self._is_free(place):
                return self._take(device_id, place)
        return self.take_bridge_slot(device_id)

    def dump(self) -> dict[str, list[str | int]]:
        """Who sits where, as JSON values for `load`."""
        return {name: [p.bus, p.slot, p.path] for name, p in self._taken.items()}

    def load(self, places: Mapping[str, Sequence[Any]], root_ports: int) -> None:
        """Take over what another layout's `dump` told."""
        self.root_ports = root_ports
        self._taken = {name: PciSlot(*place) for name, place in places.items()}

    def release(self, device_id: str) -> None:
        """Give the slot back; without effect if the device has none."""
        self._taken.pop(device_id, None)

    def _is_free(self, place: PciSlot) -> bool:
        return place not in self._taken.values()

    def _take(self, device_id: str, place: PciSlot) -> PciSlot:
        self._taken[device_id] = place
        return place
