# SPDX-License-Identifier: Apache-2.0
"""The abstract driver: one virtual machine, whatever program runs it.

A driver is used in this order::

    async with driver_for("qemu")(config) as vm:   # nothing outlives this block
        await vm.prepare()                          # inputs checked, nothing runs yet
        await vm.add_device(RngDevice(id="rng0"))         # cold: part of the VM's boot
        await vm.start()                            # VMM runs, guest is executing
        where = await vm.add_device(disk)           # hot-plug
        end = await vm.wait()                       # whoever ended it

Every method raises `vmm.errors.VmmError` (or a subclass) and nothing else for what the
VMM refuses; `trio.Cancelled` may come out of every ``async`` method.  Leaving the
``async with`` block kills the VMM and its helpers, reaps them, and removes every file
and socket that the driver made, also under cancellation.

Sizes are MiB where the name says so, else bytes.  Nothing here belongs to one VMM.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self


class Accelerator(enum.Enum):
    """What executes the guest's instructions (DESIGN decision 8)."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where on the host the VMM and its helpers live.

    Args:
        netns: network namespace to enter before exec (a path under /proc or /run/netns),
            or None to stay in the caller's.
        cgroup_procs: ``cgroup.procs`` files the process is written into before exec.
    """

    netns: Path | None = None
    cgroup_procs: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class VmConfig:
    """All that is fixed before a VM starts.  Paths are absolute.

    Args:
        id: names the VM in process titles and logs; at most 128 characters.
        state_dir: private directory for sockets and files of this VM; the driver makes
            it (0700) and removes it.  Keep it short: a unix socket path ends at 107 bytes.
        binary: the VMM program.
        kernel: ELF ``vmlinux`` (PVH) or bzImage.
        image: read-only root disk (root is its partition 1).
        initrd: the root itself if there is no `image`, else what loads the kernel's modules
            and then mounts the image.
        kernel_params: appended last, so they win over the driver's own.
        max_vcpus, max_memory_mib, memory_slots: how far hot-plug may go.
        virtio_mem: memory comes and goes by virtio-mem, which needs no slots.
        shared_memory: guest memory can be mapped by vhost-user devices.
        private_memory: what is restored maps the snapshot's memory copy-on-write, without a copy.
            For a VM without `shared_memory` and balloon, before it is saved as well.
        accelerator: AUTO detects; asking for KVM where it can't work is an error.
        generation_id: a device that tells the guest's kernel when it goes on as a clone
            (vmgenid), where the VMM has one.
        kept: its VMM can be handed over to another process (`Hypervisor.release`).
        seccomp: VMM-specific sandbox policy; "" means the driver's strictest.
        placement: see `Placement`.
    """

    id: str
    state_dir: Path
    binary: Path
    kernel: Path
    image: Path | None = None
    initrd: Path | None = None
    rootfs_type: str = "erofs"
    kernel_params: str = ""
    machine_type: str = ""
    machine_accelerators: str = ""
    cpu_features: str = ""
    firmware: Path | None = None
    vcpus: int = 1
    max_vcpus: int = 1
    memory_mib: int = 2048
    max_memory_mib: int = 2048
    memory_slots: int = 10
    virtio_mem: bool = False
    shared_memory: bool = True
    private_memory: bool = False
    hugepages: bool = False
    mem_prealloc: bool = False
    accelerator: Accelerator = Accelerator.AUTO
    generation_id: bool = False
    kept: bool = False
    seccomp: str = ""
    debug: bool = False
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """Of one disk, reading and writing together; 0 for none.

    A burst is how much may pass at once after a pause; where it is not above what passes in
    a second, the VMM's own small one is used.
    """

    bytes_per_second: int = 0
    bytes_burst: int = 0
    operations_per_second: int = 0
    operations_burst: int = 0


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """A raw disk from a file or host block device.

    Args:
        queues, queue_size, logical_sector, physical_sector: 0 leaves it to the VMM.
    """

    id: str
    path: Path
    readonly: bool = False
    driver: str = "virtio-blk"  # or "virtio-scsi"
    aio: str = "threads"
    cache_direct: bool = False
    cache_noflush: bool = False
    discard: bool = False
    serial: str = ""
    queues: int = 0
    queue_size: int = 0
    logical_sector: int = 0
    physical_sector: int = 0
    limits: DiskLimits | None = None


@dataclass(frozen=True, slots=True)
class NetDevice:
    """A virtio-net interface on already opened tap queues (one fd a queue pair)."""

    id: str
    mac: str
    tap_fds: tuple[int, ...]
    vhost_fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FsDevice:
    """A virtio-fs share served by a virtiofsd that listens on `socket`."""

    id: str
    tag: str
    socket: Path
    queue_size: int = 1024


@dataclass(frozen=True, slots=True)
class VsockDevice:
    """A virtio-vsock device.  One of `vhost_fd` (kernel vhost-vsock, CID already set),
    `socket` (a vhost-user backend listens there) or neither (the VMM's own hybrid
    vsock; the driver says where its socket is in `Hypervisor.hybrid_vsock_socket`)."""

    id: str
    cid: int
    vhost_fd: int | None = None
    socket: Path | None = None


@dataclass(frozen=True, slots=True)
class SerialDevice:
    """A named virtio-serial port, reached on the host through a unix socket that the VMM
    listens on."""

    id: str
    name: str
    socket: Path


@dataclass(frozen=True, slots=True)
class ConsoleDevice:
    """The guest's console (hvc0), as a unix socket that the VMM listens on."""

    id: str
    socket: Path


@dataclass(frozen=True, slots=True)
class BalloonDevice:
    """Memory balloon; with `free_page_reporting` freed guest pages return to the host."""

    id: str
    free_page_reporting: bool = True
    deflate_on_oom: bool = True


@dataclass(frozen=True, slots=True)
class RngDevice:
    """Entropy for the guest from a host file."""

    id: str
    source: Path = Path("/dev/urandom")


Device = (
    BlockDevice
    | NetDevice
    | FsDevice
    | VsockDevice
    | SerialDevice
    | ConsoleDevice
    | BalloonDevice
    | RngDevice
)


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """Where the guest finds a device.

    Attributes:
        pci_path: slots in hex from the root bus down, as ``02/01``; "" if not PCI.
        scsi: ``id:lun`` for virtio-scsi disks.
        node: the guest's device node where it is fixed by the VMM (``/dev/vda``).
    """

    pci_path: str = ""
    scsi: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this VMM can do with this configuration; asked before trying."""

    block_hotplug: bool = False
    net_hotplug: bool = False
    fs_hotplug: bool = False
    vsock_hotplug: bool = False
    virtio_fs: bool = False
    vcpu_hotplug: bool = False
    vcpu_unplug: bool = False
    memory_hotplug: bool = False
    memory_unplug: bool = False
    balloon: bool = False
    save_restore: bool = False
    hybrid_vsock: bool = False
    vhost_user_vsock: bool = False
    vhost_vsock: bool = False
    multiqueue: bool = False


@dataclass(frozen=True, slots=True)
class VmExit:
    """Why the VMM is no longer there.

    Attributes:
        reason: ``stopped`` (by us), ``guest-shutdown``, ``guest-panic``, or ``died``.
        detail: one sentence; for ``died`` with the last lines of the VMM's stderr.
        status: exit status of the VMM process, negative for a signal.
    """

    reason: str
    detail: str
    status: int


@dataclass(frozen=True, slots=True)
class Handover:
    """A running VM on its way from one process to another.

    Attributes:
        facts: JSON values that only the driver reads.
        descriptors: to be passed along in this order; whoever has the object closes them.
        pids: of the VMM and its keeper, to be moved into the next owner's cgroups.
    """

    facts: Mapping[str, Any]
    descriptors: tuple[int, ...]
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VmMetrics:
    """Figures about the VMM process, read from the host; the guest can't influence their type.

    Attributes:
        vcpu_threads: host thread id by vCPU, also of those that the guest does not use yet.
        vcpus, memory_mib: what the guest has now.
    """

    pids: tuple[int, ...]
    vcpu_threads: Mapping[int, int]
    vcpus: int
    memory_mib: int
    rss_bytes: int
    cpu_seconds: float


class Hypervisor(abc.ABC):
    """One VM.  See the module's docstring for the order of calls."""

    name: ClassVar[str]

    def __init__(self, config: VmConfig) -> None:
        self.config = config

    @abc.abstractmethod
    async def __aenter__(self) -> Self: ...

    @abc.abstractmethod
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    @abc.abstractmethod
    def accelerator(self) -> Accelerator:
        """KVM or TCG, as detected by `prepare`; never AUTO."""

    @property
    @abc.abstractmethod
    def version(self) -> str:
        """The VMM's own version text, known after `start`."""

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """The VMM's process id on the host.

        Raises:
            VmmGoneError: before `start` or after the end.
        """

    @property
    def hybrid_vsock_socket(self) -> Path | None:
        """Unix socket that speaks ``CONNECT port``, where the VMM itself has one."""
        return None

    @abc.abstractmethod
    async def check(self) -> None:
        """Check every input; nothing is made.

        Raises:
            VmmConfigError: names the missing file or bad value.
        """

    @abc.abstractmethod
    async def prepare(self) -> None:
        """`check`, and make what `start` needs.

        Raises:
            VmmConfigError: names the missing file or bad value.
        """

    @abc.abstractmethod
    async def start(self) -> None:
        """Launch the VMM and let the guest run.

        Raises:
            VmmError: with the VMM's last lines of stderr.
        """

    @abc.abstractmethod
    async def wait(self) -> VmExit:
        """Return when the VMM is no longer there, for whatever reason.  Many may wait."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Kill the VMM at once and reap it.  Idempotent; never raises for a VM already gone."""

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop the guest's vCPUs."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Let the vCPUs run again."""

    @abc.abstractmethod
    async def add_device(self, device: Device) -> DeviceAddress:
        """Before `start` the device is part of the boot, after it it is hot-plugged.

        Raises:
            UnsupportedError: the VMM can't have, or can't hot-plug, such a device.
            CapacityError: no slot left.
        """

    @abc.abstractmethod
    async def remove_device(self, device_id: str) -> None:
        """Unplug and return once the guest has let go of it.

        Raises:
            VmmError: the id is unknown, or the guest did not release it in time.
        """

    @abc.abstractmethod
    async def resize_disk(self, device_id: str, size: int) -> None:
        """The file or device behind a disk has `size` bytes now: tell the guest.

        Raises:
            VmmError: the id is unknown, or the VMM refused the size.
        """

    @abc.abstractmethod
    async def resize_vcpus(self, count: int) -> int:
        """Bring the VM to `count` vCPUs; returns how many it has now (the guest must still
        bring new ones online)."""

    @abc.abstractmethod
    async def resize_memory(self, mib: int) -> int:
        """Bring the VM to at least `mib` of memory; returns the size it has now in MiB.

        Where memory can be unplugged a smaller size than before is asked of the guest, which
        takes its time for it and keeps what it can't free."""

    @abc.abstractmethod
    async def save(self, directory: Path) -> None:
        """Write device state to ``directory/state``; the memory file is the VM's own.  The VM is
        paused before and stays paused."""

    @abc.abstractmethod
    async def restore(self, directory: Path) -> None:
        """Instead of `start`: launch from what `save` wrote; the VM is paused afterwards.  Needs
        the same devices as the saved VM had at its boot; others are plugged afterwards.

        Raises:
            VmmError: the files are missing, damaged, or of another VM; nothing runs then.
        """

    @abc.abstractmethod
    def release(self) -> Handover:
        """Give a VM of a `kept` configuration away.  It runs on, or stays paused; this object is
        of no further use, and the state directory is the next owner's to move and remove."""

    @abc.abstractmethod
    async def adopt(self, handover: Handover) -> None:
        """Instead of `start`, after `check`: become the owner of a VM that another process
        released.  The descriptors are the driver's from here on.  `state_dir` is in place."""

    @abc.abstractmethod
    def fingerprint(self, extra: str = "") -> str:
        """A digest of everything that a saved VM depends on: the VMM, its machine, the devices
        added so far, and the files it reads, by their identity on this host (64 hex digits).
        A VM is restored only from what was saved under the same fingerprint.  After `check`.

        Args:
            extra: what else matters to the caller.
        """

    @abc.abstractmethod
    async def metrics(self) -> VmMetrics:
        """Read the VMM's figures."""
