# SPDX-License-Identifier: Apache-2.0
"""What QEMU needs for each device, once for the command line and for QMP.

Objects, block nodes and devices are dictionaries as in QMP; QEMU takes the same as JSON on
its command line.  Character devices and net backends have two spellings, so they are small
classes that can write both.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmm.errors import UnsupportedError, VmmConfigError
from vmm.hypervisor import (
    BalloonDevice,
    BlockDevice,
    ConsoleDevice,
    Device,
    DiskLimits,
    FsDevice,
    NetDevice,
    RngDevice,
    SerialDevice,
    VsockDevice,
)
from vmm.qemu.pci import PciSlot

MAX_ID = 31
"""Longest id QEMU takes for block nodes (block.c: char node_name[32])."""

_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]+")  # QEMU's util/id.c

SERIAL_ID = "serial0"
SERIAL_BUS = f"{SERIAL_ID}.0"
SCSI_ID = "scsi0"

READ_AHEAD = 4 << 20
"""Bytes that the guest reads ahead from a read-only disk."""

FdName = Callable[[int], str]
"""Names a descriptor of ours to QEMU: its number at start, a ``getfd`` name later."""


def qemu_id(prefix: str, device_id: str) -> str:
    """``prefix-id``; where QEMU would not accept the id, a digest stands in for it."""
    name = f"{prefix}-{device_id}"
    if len(name) <= MAX_ID and _WELL_FORMED.fullmatch(device_id):
        return name
    digest = hashlib.sha256(device_id.encode()).hexdigest()
    return f"{prefix}-{digest}"[:MAX_ID]


@dataclass(frozen=True, slots=True)
class Chardev:
    """A unix socket: QEMU connects to `path`, or accepts on the listening `fd`."""

    id: str
    path: str | None = None
    fd: int | None = None

    def option(self) -> str:
        """Value for ``-chardev``; a comma in a path is doubled."""
        if self.path is not None:
            return f"socket,id={self.id},path={self.path.replace(',', ',,')}"
        return f"socket,id={self.id},fd={self.fd},server=on,wait=off"

    def arguments(self, fd_name: FdName) -> dict[str, Any]:
        """For ``chardev-add``."""
        data: dict[str, Any]
        if self.path is not None:
            data = {"addr": {"type": "unix", "data": {"path": self.path}}, "server": False}
        else:
            assert self.fd is not None
            address = {"type": "fd", "data": {"str": fd_name(self.fd)}}
            data = {"addr": address, "server": True, "wait": False}
        return {"id": self.id, "backend": {"type": "socket", "data": data}}


@dataclass(frozen=True, slots=True)
class Netdev:
    """A tap whose queues are already open."""

    id: str
    tap_fds: tuple[int, ...]
    vhost_fds: tuple[int, ...]

    def arguments(self, fd_name: FdName) -> dict[str, Any]:
        """For ``netdev_add``; the same keys make ``-netdev``."""
        one = len(self.tap_fds) == 1
        arguments: dict[str, Any] = {"type": "tap", "id": self.id}
        arguments["fd" if one else "fds"] = ":".join(map(fd_name, self.tap_fds))
        if self.vhost_fds:
            arguments["vhost"] = True
            arguments["vhostfd" if one else "vhostfds"] = ":".join(map(fd_name, self.vhost_fds))
        return arguments

    def option(self) -> str:
        pairs = self.arguments(str)
        kind = pairs.pop("type")
        return ",".join([kind, *(f"{k}={'on' if v is True else v}" for k, v in pairs.items())])


@dataclass(slots=True)
class Parts:
    """All that makes one device, in the order QEMU needs it.

    ``device`` holds the arguments of ``device_add``, ``bus`` and ``addr`` included;
    ``device_fds`` are the descriptors it names itself.
    """

    device: dict[str, Any]
    objects: list[dict[str, Any]] = field(default_factory=list)
    blockdevs: list[dict[str, Any]] = field(default_factory=list)
    chardevs: list[Chardev] = field(default_factory=list)
    netdevs: list[Netdev] = field(default_factory=list)
    device_fds: tuple[int, ...] = ()


def pci_device(driver: str, device_id: str, place: PciSlot, **extra: Any) -> dict[str, Any]:
    """A modern virtio PCI device without option ROM."""
    arguments = {
        "driver": driver,
        "id": device_id,
        "bus": place.bus,
        "addr": place.address,
        "romfile": "",
        **extra,
    }
    if driver != "vhost-user-fs-pci":  # which has never been anything else
        arguments["disable-legacy"] = "on"
    return arguments


def blockdev(node: str, device: BlockDevice) -> dict[str, Any]:
    """The raw block node of a disk.

    Raises:
        VmmConfigError: the path is neither a regular file nor a block device.
    """
    try:
        mode = device.path.stat().st_mode
    except OSError as error:
        raise VmmConfigError(f"disk {device.path}: {error.strerror}") from error
    if stat.S_ISBLK(mode):
        driver = "host_device"
    elif stat.S_ISREG(mode):
        driver = "file"
    else:
        raise VmmConfigError(f"disk {device.path} is neither a file nor a block device")
    lower: dict[str, Any] = {
        "driver": driver,
        "filename": str(device.path),
        "aio": device.aio,
        "read-only": device.readonly,
    }
    upper: dict[str, Any] = {
        "driver": "raw",
        "node-name": node,
        "read-only": device.readonly,
        "file": lower,
    }
    if device.aio == "native" or device.cache_direct or device.cache_noflush:
        cache = {
            # linux-aio works on O_DIRECT files only
            "direct": device.cache_direct or device.aio == "native",
            "no-flush": device.cache_noflush,
        }
        lower["cache"] = cache
        upper["cache"] = cache
    if device.discard:
        lower["discard"] = "unmap"
        upper["discard"] = "unmap"
    return upper


def disk_backend(device: BlockDevice) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(objects, block nodes): the raw node, and a filter above it where the disk has limits."""
    node = disk_node(device.id)
    if device.limits is None:
        return [], [blockdev(node, device)]
    group, raw = qemu_id("limit", device.id), qemu_id("raw", device.id)
    throttle: dict[str, Any] = {
        "driver": "throttle",
        "node-name": node,
        "throttle-group": group,
        "file": raw,
        "read-only": device.readonly,
    }
    limits = {"qom-type": "throttle-group", "id": group, "limits": throttle_limits(device.limits)}
    return [limits], [blockdev(raw, device), throttle]


def throttle_limits(limits: DiskLimits) -> dict[str, int]:
    """QEMU's ThrottleLimits; a bucket (``-max``) must not be smaller than what fills it."""
    found: dict[str, int] = {}
    for name, rate, burst in (
        ("bps-total", limits.bytes_per_second, limits.bytes_burst),
        ("iops-total", limits.operations_per_second, limits.operations_burst),
    ):
        if rate:
            found[name] = rate
            if burst > rate:
                found[f"{name}-max"] = burst
    return found


def disk_node(device_id: str) -> str:
    """The block node that a disk's device stands on."""
    return qemu_id("drive", device_id)


def _sectors(device: BlockDevice) -> dict[str, int]:
    sizes = {
        "logical_block_size": device.logical_sector,
        "physical_block_size": device.physical_sector,
    }
    return {name: size for name, size in sizes.items() if size}


def virtio_blk(device: BlockDevice, place: PciSlot) -> Parts:
    node = disk_node(device.id)
    extra: dict[str, Any] = {"drive": node, "share-rw": True, **_sectors(device)}
    if device.queues:
        extra["num-queues"] = device.queues
    if device.queue_size:
        extra["queue-size"] = device.queue_size
    if device.readonly:
        # Linux reads ahead twice that much: a cold program is a few requests, not hundreds.
        extra["opt_io_size"] = READ_AHEAD // 2
    if device.serial:
        extra["serial"] = device.serial[:20]  # VIRTIO_BLK_ID_BYTES
    objects, nodes = disk_backend(device)
    return Parts(
        pci_device("virtio-blk-pci", qemu_id("virtio", device.id), place, **extra),
        objects=objects,
        blockdevs=nodes,
    )


def scsi_disk(device: BlockDevice, target: int, lun: int) -> Parts:
    node = disk_node(device.id)
    arguments: dict[str, Any] = {
        "driver": "scsi-hd",
        "id": qemu_id("virtio", device.id),
        "bus": f"{SCSI_ID}.0",
        "drive": node,
        "scsi-id": target,
        "lun": lun,
        "share-rw": True,
        **_sectors(device),
    }
    if device.serial:
        arguments["serial"] = device.serial[:36]
    objects, nodes = disk_backend(device)
    return Parts(arguments, objects=objects, blockdevs=nodes)


def virtio_net(device: NetDevice, place: PciSlot) -> Parts:
    netdev = Netdev(qemu_id("network", device.id), device.tap_fds, device.vhost_fds)
    extra: dict[str, Any] = {"netdev": netdev.id, "mac": device.mac}
    if len(device.tap_fds) > 1:
        extra |= {"mq": True, "vectors": 2 * len(device.tap_fds) + 2}
    return Parts(
        pci_device("virtio-net-pci", qemu_id("virtio", device.id), place, **extra),
        netdevs=[netdev],
    )


def virtio_fs(device: FsDevice, place: PciSlot) -> Parts:
    chardev = Chardev(qemu_id("char", device.id), path=str(device.socket))
    return Parts(
        pci_device(
            "vhost-user-fs-pci",
            qemu_id("fs", device.id),
            place,
            chardev=chardev.id,
            tag=device.tag,
            **{"queue-size": device.queue_size},
        ),
        chardevs=[chardev],
    )


def virtio_vsock(device: VsockDevice, place: PciSlot, fd_name: FdName) -> Parts:
    """Kernel vhost-vsock or a vhost-user backend.

    Raises:
        UnsupportedError: neither is given; QEMU has no vsock of its own.
    """
    name = qemu_id("vsock", device.id)
    if device.vhost_fd is not None:
        return Parts(
            pci_device(
                "vhost-vsock-pci",
                name,
                place,
                vhostfd=fd_name(device.vhost_fd),
                **{"guest-cid": device.cid},
            ),
            device_fds=(device.vhost_fd,),
        )
    if device.socket is None:
        raise UnsupportedError("QEMU needs vhost-vsock or a vhost-user backend for vsock")
    chardev = Chardev(qemu_id("char", device.id), path=str(device.socket))
    return Parts(
        pci_device("vhost-user-vsock-pci", name, place, chardev=chardev.id),
        chardevs=[chardev],
    )


def serial_port(device: SerialDevice | ConsoleDevice, listen_fd: int) -> Parts:
    """A port of the virtio-serial controller; the host's end is a listening socket."""
    chardev = Chardev(qemu_id("char", device.id), fd=listen_fd)
    arguments: dict[str, Any] = {
        "driver": "virtconsole" if isinstance(device, ConsoleDevice) else "virtserialport",
        "id": qemu_id("port", device.id),
        "bus": SERIAL_BUS,
        "chardev": chardev.id,
    }
    if isinstance(device, SerialDevice):
        arguments["name"] = device.name
    return Parts(arguments, chardevs=[chardev])


def virtio_balloon(device: BalloonDevice, place: PciSlot) -> Parts:
    return Parts(
        pci_device(
            "virtio-balloon-pci",
            qemu_id("balloon", device.id),
            place,
            **{
                "deflate-on-oom": device.deflate_on_oom,
                "free-page-reporting": device.free_page_reporting,
            },
        )
    )


def virtio_rng(device: RngDevice, place: PciSlot) -> Parts:
    backend = qemu_id("rng-source", device.id)
    return Parts(
        pci_device("virtio-rng-pci", qemu_id("rng", device.id), place, rng=backend),
        objects=[{"qom-type": "rng-random", "id": backend, "filename": str(device.source)}],
    )


def kind_of(device: Device) -> str:
    """For messages: ``BlockDevice`` -> ``block``."""
    return type(device).__name__.removesuffix("Device").lower()


def describe(
    device: Device,
    place: PciSlot | None,
    *,
    fd_name: FdName = str,
    listen_fd: int | None = None,
    scsi: tuple[int, int] = (0, 0),
) -> Parts:
    """What QEMU needs for `device`.

    Args:
        place: its PCI slot; None for serial ports and virtio-scsi disks, which have none.
        fd_name: see `FdName`.
        listen_fd: listening socket of a serial port or console.
        scsi: target and LUN of a virtio-scsi disk.
    """
    if isinstance(device, ConsoleDevice | SerialDevice):
        assert listen_fd is not None
        return serial_port(device, listen_fd)
    if isinstance(device, BlockDevice) and device.driver == "virtio-scsi":
        return scsi_disk(device, *scsi)
    assert place is not None
    match device:
        case BlockDevice():
            return virtio_blk(device, place)
        case NetDevice():
            return virtio_net(device, place)
        case FsDevice():
            return virtio_fs(device, place)
        case VsockDevice():
            return virtio_vsock(device, place, fd_name)
        case BalloonDevice():
            return virtio_balloon(device, place)
        case RngDevice():
            return virtio_rng(device, place)


def scsi_controller(place: PciSlot) -> Parts:
    return Parts(pci_device("virtio-scsi-pci", SCSI_ID, place))
