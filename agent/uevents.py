# SPDX-License-Identifier: Apache-2.0
"""Devices that appear while the guest runs: kernel events, and sysfs as the truth.

An event only says that it is worth looking again. So nothing is missed when a device was there
before anybody asked, when the socket's buffer overran, or when the event came before its node.
"""

from __future__ import annotations

import os

from agent.waiting import Wait
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.waiting import Work

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_EVENTS = 1  # the multicast group
_DRIVER_OK = 4  # VIRTIO_CONFIG_S_DRIVER_OK
_PXB_FIRST_BUS = 0x20  # a first element from here on names a root complex, not a slot


class Uevents:
    """The kernel's event socket. Readable: call `drain()`, then check every parked Wait."""

    def __init__(self) -> None:
        import _socket

        kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        self._socket.bind((0, _KERNEL_EVENTS))

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> int:
        """Read all events there are; returns how many (an overrun counts as one)."""
        count = 0
        while True:
            try:
                self._socket.recv(8192)
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno != 105:  # ENOBUFS: some were lost, which is an event too
                    raise
            count += 1

    def close(self) -> None:
        self._socket.close()


def parse_pci_path(text: str) -> list[tuple[int, int]]:
    """`02/00/01.1` as (slot, function) pairs. Raises INVALID_ARGUMENT."""
    elements = []
    for part in text.split("/"):
        slot, dot, function = part.partition(".")
        try:
            pair = (int(slot, 16), int(function, 16) if dot else 0)
        except ValueError:
            pair = (-1, 0)
        if not (0 <= pair[0] <= 0xFF and 0 <= pair[1] <= 7) or len(slot) != 2:
            raise RpcError(Code.INVALID_ARGUMENT, f"PCI path {text!r}: {part!r} is not SS or SS.F")
        elements.append(pair)
    for slot_number, _ in elements[1 if len(elements) >= 3 else 0 :]:
        if slot_number > 0x1F:
            raise RpcError(Code.INVALID_ARGUMENT, f"PCI path {text!r}: slots end at 1f")
    return elements


def pci_device(path: str, sysfs: str = "/sys") -> str | None:
    """The sysfs directory of the device at a PCI path, or None if it isn't there (yet)."""
    elements = parse_pci_path(path)
    bus = "0000:00"
    if len(elements) >= 3 and elements[0][0] >= _PXB_FIRST_BUS:
        bus = f"0000:{elements.pop(0)[0]:02x}"
    directory = _root_bus(bus, sysfs)
    for index, (slot, function) in enumerate(elements):
        directory = f"{directory}/{bus}:{slot:02x}.{function:x}"
        if not os.path.isdir(directory):
            return None
        if index < len(elements) - 1:
            try:
                children = os.listdir(f"{directory}/pci_bus")
            except FileNotFoundError:
                return None
            if not children:
                return None
            bus = children[0]
    return directory


def _root_bus(bus: str, sysfs: str) -> str:
    """The directory of a root bus: directly below devices, or below an ARM host bridge."""
    directory = f"{sysfs}/devices/pci{bus}"
    platform = f"{sysfs}/devices/platform"
    if not os.path.isdir(directory) and os.path.isdir(platform):
        for name in os.listdir(platform):
            below = f"{platform}/{name}/pci{bus}"
            if name.endswith(".pcie") and os.path.isdir(below):
                return below
    return directory


def pci_block_name(path: str, sysfs: str = "/sys") -> str | None:
    """The kernel name (`vdb`) of the virtio disk at a PCI path, or None."""
    return _child(pci_device(path, sysfs), "block")


def pci_net_name(path: str, sysfs: str = "/sys") -> str | None:
    """The interface name of the virtio NIC at a PCI path, or None."""
    return _child(pci_device(path, sysfs), "net")


def scsi_block_name(address: str, sysfs: str = "/sys") -> str | None:
    """The kernel name (`sda`) of the disk at `id:lun` on channel 0 of any host, or None."""
    target, lun = parse_scsi_address(address)
    devices = f"{sysfs}/bus/scsi/devices"
    if not os.path.isdir(devices):
        return None
    for name in sorted(os.listdir(devices)):
        if name.count(":") == 3 and name.split(":")[1:] == ["0", str(target), str(lun)]:
            return _only_child(f"{devices}/{name}/block")
    return None


def parse_scsi_address(text: str) -> tuple[int, int]:
    """`id:lun` as numbers. Raises INVALID_ARGUMENT."""
    target, colon, lun = text.partition(":")
    if not (colon and target.isdigit() and lun.isdigit()):
        raise RpcError(Code.INVALID_ARGUMENT, f"SCSI address {text!r} is not id:lun")
    return int(target), int(lun)


def _child(device: str | None, kind: str) -> str | None:
    """The `kind` device of the virtio device (or of the PCI device itself) in a directory."""
    if device is None:
        return None
    for name in os.listdir(device):
        if name.startswith("virtio"):
            return _only_child(f"{device}/{name}/{kind}")
    return _only_child(f"{device}/{kind}")


def _only_child(directory: str) -> str | None:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return None
    return names[0] if names else None


def wait_block_device(
    kind: str, identifier: str, timeout: float, sysfs: str = "/sys", dev: str = "/dev"
) -> Work[str]:
    """Wait for a disk; returns its node.

    kind: `blk` (PCI path or node), `scsi` (id:lun), `mmioblk` and `nvdimm` (node).
    Raises INVALID_ARGUMENT for a malformed identifier, DEADLINE_EXCEEDED if nothing came.
    """
    found: list[str] = []
    rescan: str | None = None
    if identifier.startswith("/dev/"):
        node = dev + identifier[len("/dev") :]

        def name() -> str | None:
            return node[len(dev) + 1 :]

    elif kind == "blk":
        parse_pci_path(identifier)
        rescan = f"{sysfs}/bus/pci/rescan"

        def name() -> str | None:
            return pci_block_name(identifier, sysfs)

    elif kind == "scsi":
        target, lun = parse_scsi_address(identifier)
        scanned: set[str] = set()  # the controller may be as new as its disk

        def name() -> str | None:
            scan_scsi(target, lun, scanned, sysfs)
            return scsi_block_name(identifier, sysfs)

    else:
        raise RpcError(Code.INVALID_ARGUMENT, f"{kind} device {identifier!r} is not below /dev")

    def ready() -> bool:
        found[:] = [f"{dev}/{text}" for text in (name(),) if text]
        return bool(found) and os.path.exists(found[0])

    yield from wait_for(f"{kind} device {identifier}", ready, timeout, rescan)
    return found[0]


def opens(node: str) -> bool:
    """Whether a device is there for use: its node appears a little before it can be opened."""
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.errno not in (2, 6)  # ENOENT, ENXIO; another error is for the mount to tell
    os.close(descriptor)
    return True


def wait_for(
    what: str, ready: Callable[[], bool], timeout: float, rescan: str | None = None
) -> Work[None]:
    """Wait until `ready()`; a quarter of a second in, ask the bus to look for new devices.

    ACPI and PCIe hot-plug find a device by themselves at once; a hot-plug controller of a plain
    PCI bridge waits five seconds for an operator to change his mind.
    """
    if ready():
        return
    if rescan is not None and timeout > 0.25:
        try:
            yield Wait(what, ready, 0.25)
        except RpcError:
            write_sysfs(rescan, "1")
        else:
            return
    yield Wait(what, ready, timeout)


def scan_scsi(target: int, lun: int, scanned: set[str], sysfs: str = "/sys") -> None:
    """Ask every SCSI host that is not in `scanned` yet to look at one address: channel, id, lun."""
    try:
        hosts = os.listdir(f"{sysfs}/class/scsi_host")
    except FileNotFoundError:
        raise RpcError(
            Code.NOT_FOUND, f"SCSI address {target}:{lun}: the guest has no SCSI host"
        ) from None
    for host in hosts:
        directory = f"{sysfs}/class/scsi_host/{host}"
        if host not in scanned and _takes_commands(directory):
            scanned.add(host)
            write_sysfs(f"{directory}/scan", f"0 {target} {lun}")


def _takes_commands(host: str) -> bool:
    """Whether the driver of a virtio host has said that it is ready: a command queued before that
    is not seen by the device, and a scan would wait for it until it times out."""
    virtio = os.path.realpath(f"{host}/../../..")  # …/virtio5/host0/scsi_host/host0
    try:
        with open(f"{virtio}/status", encoding="ascii") as file:
            return bool(int(file.read(), 16) & _DRIVER_OK)
    except (OSError, ValueError):  # no virtio device
        return True


def write_sysfs(path: str, text: str) -> bool:
    """Write one attribute; False if it isn't there or refused."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
