# SPDX-License-Identifier: Apache-2.0
"""Files and block devices of the host as disks of a running VM.

Each is plugged once, however many containers of the pod have it, and unplugged with the last.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from vmm.errors import CapacityError, VmmError, VmmGoneError
from vmm.hypervisor import BlockDevice, DeviceAddress, DiskLimits

if TYPE_CHECKING:
    from shimv2.config import HypervisorConfig
    from shimv2.guest import Guest

log = logging.getLogger("sandbox")

_IO_URING_SETUP = 425  # on every architecture

# What says whether two paths are the same disk: (kind, numbers …, read-only)
_Identity = tuple[str, int, int, bool]


class DriveError(Exception):
    """Something can't be a disk of a VM; the message names it."""


class Drive:
    """A disk in the VM.

    Attributes:
        id: the VMM's device.
        path: what it is on the host.
        address: where the guest finds it.
        holders: ids of the containers that have it.
    """

    __slots__ = ("address", "holders", "id", "path", "readonly")

    def __init__(self, name: str, path: Path, readonly: bool, address: DeviceAddress) -> None:
        self.id = name
        self.path = path
        self.readonly = readonly
        self.address = address
        self.holders: set[str] = set()

    @property
    def driver(self) -> str:
        """As the agent's protocol calls it: blk or scsi."""
        return "scsi" if self.address.scsi else "blk"

    @property
    def source(self) -> str:
        """Where the guest finds it: a PCI path, or ``id:lun``."""
        return self.address.scsi or self.address.pci_path


class Drives:
    """The disks of one VM that were plugged for containers."""

    def __init__(self, config: HypervisorConfig, guest: Guest) -> None:
        self._config = config
        self._guest = guest
        self._lock = trio.Lock()
        self._drives: dict[_Identity, Drive] = {}
        self._count = 0
        self._volumes: dict[str, set[str]] = {}  # path of a direct volume → who has it

    @property
    def written(self) -> bool:
        """Whether the guest may have in its memory what is not on a disk yet."""
        return any(not drive.readonly for drive in self._drives.values())

    async def plug(self, path: Path, holder: str, *, readonly: bool) -> Drive:
        """A disk for `holder`, the id of a container; the same one if it is there already.

        Raises:
            DriveError: there is no such file or device, or the host itself uses it.
            CapacityError: the VM has no place left.
            VmmError: the VMM refused it.
        """
        async with self._lock:
            identity = _identify(path, readonly)
            drive = self._drives.get(identity)
            if drive is None and readonly:  # two disks of one file would not see each other
                drive = self._drives.get((*identity[:3], False))
            if drive is None:
                self._count += 1
                name = f"disk{self._count}"
                try:
                    address = await self._guest.add_device(self._device(name, path, readonly))
                except CapacityError as error:
                    raise CapacityError(f"disk {path}: {error}{self._advice()}") from error
                drive = self._drives[identity] = Drive(name, path, readonly, address)
            drive.holders.add(holder)
            return drive

    async def release(self, holder: str) -> None:
        """Unplug what nobody else has.  The guest has let go of it; what it still holds stays
        for the next who wants it, with a warning.  Idempotent."""
        async with self._lock:
            for identity, drive in list(self._drives.items()):
                drive.holders.discard(holder)
                if drive.holders:
                    continue
                try:
                    await self._guest.remove_device(drive.id)
                except VmmGoneError:
                    pass
                except VmmError as error:
                    log.warning("disk %s stays plugged: %s", drive.path, error)
                    continue
                del self._drives[identity]

    def hold_volume(self, source: str, holder: str) -> None:
        """A container has a direct volume whose disk was plugged."""
        self._volumes.setdefault(source, set()).add(holder)

    def drop_volume(self, source: str, holder: str) -> bool:
        """It has it no longer; returns whether nobody else has.  Idempotent."""
        holders = self._volumes.get(source, set())
        holders.discard(holder)
        if not holders:
            self._volumes.pop(source, None)
        return not holders

    async def grow(self, path: Path, size: int) -> None:
        """Tell the guest that a disk has become larger on the host; nothing if it has it not.

        Raises:
            DriveError: it has less than `size` bytes.
            VmmError: the VMM refused it.
        """
        async with self._lock:
            there = _size(path)
            if there < size:
                raise DriveError(f"disk {path} has {there} bytes, {size} are wanted")
            for readonly in (False, True):
                drive = self._drives.get(_identify(path, readonly))
                if drive is not None:
                    await self._guest.vm.resize_disk(drive.id, there)

    def _device(self, name: str, path: Path, readonly: bool) -> BlockDevice:
        config = self._config
        cache = config.block_device_cache_set
        return BlockDevice(
            id=name,
            path=path,
            readonly=readonly,
            driver=config.block_device_driver,
            aio=self._aio(),
            cache_direct=cache and config.block_device_cache_direct,
            cache_noflush=cache and config.block_device_cache_noflush,
            queues=config.num_queues,
            queue_size=config.queue_size,
            logical_sector=config.block_device_logical_sector_size,
            physical_sector=config.block_device_physical_sector_size,
            limits=disk_limits(config),
        )

    def _aio(self) -> str:
        wanted = self._config.block_device_aio
        if wanted == "io_uring" and not has_io_uring():
            log.warning('block_device_aio = "io_uring": this host has none, "threads" is used')
            return "threads"
        return wanted

    def _advice(self) -> str:
        if self._config.block_device_driver == "virtio-scsi":
            return ""
        return '; with block_device_driver = "virtio-scsi" disks need no slot of their own'


def has_io_uring() -> bool:
    """Whether the kernel lets this process have one: containers and sysctls often forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_IO_URING_SETUP, 1, None)
    return ctypes.get_errno() == errno.EFAULT  # a NULL for its parameters


def disk_limits(config: HypervisorConfig) -> DiskLimits | None:
    """``disk_rate_limiter_*``: bits and operations a second; None for no limit."""
    limits = DiskLimits(
        bytes_per_second=config.disk_rate_limiter_bw_max_rate // 8,
        bytes_burst=config.disk_rate_limiter_bw_one_time_burst // 8,
        operations_per_second=config.disk_rate_limiter_ops_max_rate,
        operations_burst=config.disk_rate_limiter_ops_one_time_burst,
    )
    return limits if limits.bytes_per_second or limits.operations_per_second else None


def host_node(major: int, minor: int) -> Path:
    """The host's node of a block device.

    Raises:
        DriveError: the host has no such device.
    """
    try:
        lines = Path(f"/sys/dev/block/{major}:{minor}/uevent").read_text().splitlines()
    except OSError:
        raise DriveError(f"block device {major}:{minor} does not exist on this host") from None
    names = [line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")]
    if not names:
        raise DriveError(f"block device {major}:{minor} has no name on this host")
    return Path("/dev", names[0])


def _identify(path: Path, readonly: bool) -> _Identity:
    try:
        status = path.stat()
        if stat.S_ISBLK(status.st_mode):
            if not readonly:
                # EBUSY while the host has it mounted: two kernels would write to one file system.
                os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
            return ("b", os.major(status.st_rdev), os.minor(status.st_rdev), readonly)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise DriveError(f"disk {path} is in use on this host, perhaps mounted") from None
        raise DriveError(f"disk {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DriveError(f"disk {path} is neither a file nor a block device")
    return ("f", status.st_dev, status.st_ino, readonly)


def _size(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise DriveError(f"disk {path}: {error.strerror}") from error
