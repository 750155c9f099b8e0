# SPDX-License-Identifier: Apache-2.0
"""QEMU behind the abstract driver: the life of one VM."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vmm import accelerator as accelerators
from vmm.errors import (
    UnsupportedError,
    VmmConfigError,
    VmmError,
    VmmGoneError,
    single_error,
)
from vmm.hypervisor import (
    Accelerator,
    BalloonDevice,
    BlockDevice,
    Capabilities,
    ConsoleDevice,
    Device,
    DeviceAddress,
    FsDevice,
    Handover,
    Hypervisor,
    NetDevice,
    SerialDevice,
    VmConfig,
    VmExit,
    VmMetrics,
    VsockDevice,
)
from vmm.kept_process import KeptProcess
from vmm.process import HelperProcess
from vmm.qemu import (
    command_line,
    devices,
    fingerprint,
    firmware,
    hotplug,
    kernel,
    memory,
    metrics,
    pci,
    snapshot,
)
from vmm.qemu.devices import Parts, kind_of
from vmm.qemu.qmp import Event, Greeting
from vmm.qemu.qmp_client import QmpClient
from vmm.qemu.scsi import ScsiBus

log = logging.getLogger(__name__)

START_TIMEOUT = 60.0
"""Seconds until a QEMU that neither runs nor ends is given up (a vhost-user backend hangs)."""

MAX_VCPUS = 255  # without an interrupt-remapping IOMMU
MAX_SOCKET_PATH = 107  # sizeof(sun_path) - 1

_ENDS = {  # RunState ShutdownCause of QMP's SHUTDOWN event
    "guest-shutdown": ("guest-shutdown", "the guest shut down"),
    "guest-reset": ("guest-shutdown", "the guest rebooted"),
    "guest-panic": ("guest-panic", "the guest's kernel panicked"),
}


class Qemu(Hypervisor):
    """One QEMU process.  See `vmm.hypervisor` for the order of calls."""

    name = "qemu"

    def __init__(self, config: VmConfig) -> None:
        super().__init__(config)
        self._accelerator: Accelerator | None = None
        self._vcpus = config.vcpus
        self._layout = pci.PciLayout()
        self._boot_devices: list[Device] = []
        self._boot_parts: list[Parts] = []
        self._boot_fds = ExitStack()
        self._pass_fds: list[int] = []
        self._scsi = ScsiBus()
        self._device_ids: set[str] = set()
        self._sockets: dict[str, Path] = {}
        self._process: HelperProcess | None = None
        self._qmp: QmpClient | None = None
        self._plugger: hotplug.Plugger | None = None
        self._stopping = False
        self._released = False
        self._shutdown_reason = ""
        self._panicked = False
        self._moved = trio.Event()  # the state is out of this QEMU, or in it; or that has failed
        self._exit: VmExit | None = None
        self._exited = trio.Event()
        self._supervised = trio.Event()  # `_supervise` is over, also by being cancelled
        self._nursery_manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    # -- life ---------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._nursery is not None
        await self.stop()
        self._nursery.cancel_scope.cancel()
        # An exception of the block's body passes by the nursery, which would wrap it in a
        # group; a Cancelled may be the nursery's own and has to end there.
        if exc is not None and not isinstance(exc, trio.Cancelled):
            exc_type = exc = tb = None
        await self._nursery_manager.__aexit__(exc_type, exc, tb)

    async def prepare(self) -> None:
        await self.check()
        self._make_state_dir()

    async def check(self) -> None:
        config = self.config
        _check_file("QEMU", config.binary)
        if not os.access(config.binary, os.X_OK):
            raise VmmConfigError(f"QEMU {config.binary} is not executable")
        kernel.detect_format(config.kernel)
        if config.image is None and config.initrd is None:
            raise VmmConfigError("a guest image or an initrd is needed")
        for what, path in (
            ("guest image", config.image),
            ("initrd", config.initrd),
            ("firmware", config.firmware),
        ):
            if path is not None:
                _check_file(what, path)
        if not 1 <= config.vcpus <= MAX_VCPUS or config.max_vcpus > MAX_VCPUS:
            raise VmmConfigError(
                f"{config.vcpus} vCPUs (at most {config.max_vcpus}) are not between 1 and {MAX_VCPUS}"
            )
        memory.check(config)
        command_line.machine_type(config)
        self._accelerator = accelerators.choose(config.accelerator)

    async def start(self) -> None:
        memory_fd = memory.make_file(self.config)
        try:
            await self._launch(memory_fd, incoming=False)
        finally:
            if memory_fd is not None:
                os.close(memory_fd)

    async def wait(self) -> VmExit:
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    async def stop(self) -> None:
        self._stopping = True
        if self._released:
            return
        with trio.CancelScope(shield=True):
            if self._process is not None and self._process.started:
                await self._process.kill()
                with trio.move_on_after(1):  # the last events tell why it ended
                    await self._supervised.wait()
                self._record_exit(self._process)
        self._clean_up()

    async def pause(self) -> None:
        await self._control.execute("stop")

    async def resume(self) -> None:
        await self._control.execute("cont")

    # -- facts --------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        more_vcpus = self.config.max_vcpus > self.config.vcpus
        return Capabilities(
            block_hotplug=True,
            net_hotplug=True,
            fs_hotplug=True,
            vsock_hotplug=True,
            virtio_fs=self.config.shared_memory,
            vcpu_hotplug=more_vcpus,
            vcpu_unplug=more_vcpus and not command_line.boots_all_vcpus(self.accelerator),
            memory_hotplug=memory.can_grow(self.config),
            memory_unplug=self.config.virtio_mem and memory.can_grow(self.config),
            balloon=not self.config.private_memory,
            save_restore=memory.can_be_saved(self.config),
            vhost_user_vsock=self.config.shared_memory,
            vhost_vsock=True,
            multiqueue=True,
        )

    @property
    def accelerator(self) -> Accelerator:
        if self._accelerator is None:
            raise VmmError("the accelerator is known after prepare() only")
        return self._accelerator

    @property
    def version(self) -> str:
        greeting = self._qmp.greeting if self._qmp is not None else None
        return ".".join(map(str, greeting.version)) if greeting is not None else ""

    @property
    def pid(self) -> int:
        if self._process is None or not self._process.started or self._process.ended:
            raise VmmGoneError("QEMU is not running")
        return self._process.pid

    async def metrics(self) -> VmMetrics:
        return await metrics.read(self._control, self.pid, self._vcpus, self._hot.memory_mib)

    # -- devices ------------------------------------------------------------

    async def add_device(self, device: Device) -> DeviceAddress:
        self._check_device(device)
        self._device_ids.add(device.id)
        try:
            if self._process is None:
                return self._add_boot_device(device)
            return await self._plug(device)
        except BaseException:
            self._forget_device(device.id)
            raise

    async def remove_device(self, device_id: str) -> None:
        await self._hot.unplug(device_id)
        self._forget_device(device_id)

    async def resize_disk(self, device_id: str, size: int) -> None:
        await self._hot.resize_disk(device_id, size)

    async def resize_vcpus(self, count: int) -> int:
        if not 1 <= count <= max(self.config.vcpus, self.config.max_vcpus):
            raise VmmConfigError(
                f"{count} vCPUs are not between 1 and {self.config.max_vcpus}, this VM's limits"
            )
        if command_line.boots_all_vcpus(self.accelerator):
            self._vcpus = max(self._vcpus, count)  # they are there; the guest takes them
        else:
            self._vcpus = await self._hot.resize_vcpus(count)
        return self._vcpus

    async def resize_memory(self, mib: int) -> int:
        return await self._hot.resize_memory(mib, self._layout.take_bridge_slot)

    # -- snapshots ----------------------------------------------------------

    async def save(self, directory: Path) -> None:
        if not self.capabilities.save_restore:
            raise UnsupportedError("only a VM whose memory is a file without hugepages is saved")
        if self._hot.memory_mib != self.config.memory_mib:
            raise UnsupportedError("a VM whose memory has grown cannot be saved")
        self._moved = trio.Event()
        await snapshot.save(self._control, self.pid, directory, self._moved)

    async def restore(self, directory: Path) -> None:
        with snapshot.open_memory(directory, self.config.memory_mib) as source:
            if not self.capabilities.save_restore:
                raise UnsupportedError("only a VM with a memory file is restored")
            private = self.config.private_memory
            memory_fd = os.dup(source) if private else memory.make_file(self.config)
            assert memory_fd is not None
            try:
                # QEMU starts while the memory is copied; it reads none before the state comes.
                async with trio.open_nursery() as nursery:
                    if not private:
                        nursery.start_soon(snapshot.copy_memory, source, memory_fd)
                        await trio.lowlevel.checkpoint()  # its thread is at work before we fork
                    await self._launch(memory_fd, incoming=True)
            except BaseExceptionGroup as group:
                await self.stop()
                raise single_error(group) from None
            finally:
                os.close(memory_fd)
        try:
            await snapshot.load_state(self._control, directory, self._moved)
        except BaseException:
            await self.stop()
            raise

    def release(self) -> Handover:
        process, qmp = self._process, self._qmp
        if not isinstance(process, KeptProcess) or qmp is None:
            raise VmmError("only a running VM that was made to be kept is handed over")
        assert qmp.greeting is not None
        assert self._nursery is not None
        facts = {
            "version": list(qmp.greeting.version),
            "root_ports": self._layout.root_ports,
            "places": self._layout.dump(),
            "devices": sorted(self._device_ids),
            "pid": process.pid,
            "keeper": process.keeper_pid,
        }
        descriptors = (qmp.duplicate(), *process.let_go())
        self._released = True
        self._nursery.cancel_scope.cancel()
        return Handover(facts, descriptors, (process.pid, process.keeper_pid))

    async def adopt(self, handover: Handover) -> None:
        if self._nursery is None or self._accelerator is None or self._process is not None:
            raise VmmError("adopt() needs the async with block, check() and nothing started")
        facts = handover.facts
        qmp_fd, *rest = handover.descriptors
        self._layout.load(facts["places"], facts["root_ports"])
        self._device_ids = set(facts["devices"])
        self._process = KeptProcess.adopt(
            facts["pid"],
            facts["keeper"],
            tuple(rest),
            name="QEMU",
            nursery=self._nursery,
            on_line=_log_line,
        )
        greeting = Greeting(tuple(facts["version"]), "")
        self._qmp = QmpClient(socket.socket(fileno=qmp_fd), self._on_event, greeting)
        self._plugger = hotplug.Plugger(self._qmp, self.config)
        self._nursery.start_soon(self._qmp.run, name="qmp")
        self._nursery.start_soon(self._supervise, name="qemu supervisor")
        await self._qmp.execute("query-status")

    def fingerprint(self, extra: str = "") -> str:
        ports = pci.ports_for(self._boot_devices)
        parts = [part.device for part in self._boot_parts]
        return fingerprint.fingerprint(self.config, self.accelerator, parts, ports, extra)

    # -- inside -------------------------------------------------------------

    @property
    def _control(self) -> QmpClient:
        if self._qmp is None or self._exited.is_set():
            raise VmmGoneError("QEMU is not running")
        return self._qmp

    @property
    def _hot(self) -> hotplug.Plugger:
        if self._plugger is None or self._exited.is_set():
            raise VmmGoneError("QEMU is not running")
        return self._plugger

    async def _launch(self, memory_fd: int | None, *, incoming: bool) -> None:
        if self._nursery is None or self._accelerator is None:
            raise VmmError("start() needs the async with block and prepare() before it")
        if self._process is not None:
            raise VmmError("this VM was started before")
        ours, theirs = socket.socketpair()
        self._boot_fds.callback(theirs.close)
        self._pass_fds.append(theirs.fileno())
        parts = list(self._boot_parts)
        if self.config.image is not None:
            disk = BlockDevice(id="image", path=self.config.image, readonly=True)
            parts.insert(0, devices.virtio_blk(disk, pci.root_slot(pci.ROOT_DISK_SLOT)))
        self._layout.root_ports = pci.ports_for(self._boot_devices)
        boot = command_line.Boot(
            config=self.config,
            accelerator=self._accelerator,
            devices=parts,
            root_ports=self._layout.root_ports,
            qmp_fd=theirs.fileno(),
            firmware=firmware.choose(self.config),
            memory_fd=memory_fd,
            incoming=incoming,
        )
        if memory_fd is not None:
            self._pass_fds.append(memory_fd)
        kind = KeptProcess if self.config.kept else HelperProcess
        self._process = kind(
            command_line.build(boot),
            name="QEMU",
            placement=self.config.placement,
            pass_fds=self._pass_fds,
            on_line=_log_line,
        )
        try:
            self._process.start(self._nursery)
            self._boot_fds.close()
            self._qmp = QmpClient(ours, self._on_event)
            self._plugger = hotplug.Plugger(self._qmp, self.config)
            for device, part in zip(self._boot_devices, self._boot_parts, strict=True):
                self._plugger.register(device.id, part)
            self._nursery.start_soon(self._qmp.run, name="qmp")
            self._nursery.start_soon(self._supervise, name="qemu supervisor")
            await self._await_control(self._process, self._qmp)
        except BaseException:
            ours.close()
            await self.stop()
            raise

    async def _await_control(self, process: HelperProcess, qmp: QmpClient) -> None:
        """Until QMP answers; the guest is running by then.  Raises VmmError if QEMU ends."""
        with trio.move_on_after(START_TIMEOUT):
            try:
                await qmp.wait_ready()
                return
            except VmmGoneError:
                await process.wait()
                raise VmmError(f"QEMU did not start: {process.describe_end()}") from None
        text = process.output.text()
        raise VmmError(f"QEMU did not start within {START_TIMEOUT:g} s" + (text and f":\n{text}"))

    async def _supervise(self) -> None:
        assert self._process is not None and self._qmp is not None
        process = self._process
        try:
            await process.wait()
            await self._qmp.wait_closed()  # events that QEMU sent last are in by then
        finally:
            if process.ended and not self._released:
                self._record_exit(process)
            self._supervised.set()

    def _record_exit(self, process: HelperProcess) -> None:
        if self._exit is None:
            self._exit = self._explain_exit(process)
            self._exited.set()
            if self._plugger is not None:
                self._plugger.vm_gone()

    def _explain_exit(self, process: HelperProcess) -> VmExit:
        status = process.returncode
        assert status is not None
        if self._panicked:
            return VmExit("guest-panic", "the guest's kernel panicked", status)
        if self._shutdown_reason in _ENDS:
            reason, detail = _ENDS[self._shutdown_reason]
            return VmExit(reason, detail, status)
        if self._stopping:
            return VmExit("stopped", "QEMU was stopped", status)
        return VmExit("died", process.describe_end(), status)

    def _on_event(self, event: Event) -> None:
        if event.name == "SHUTDOWN":
            self._shutdown_reason = str(event.data.get("reason", ""))
        elif event.name == "GUEST_PANICKED":
            self._panicked = True
        elif event.name == "MIGRATION":
            if event.data.get("status") in ("completed", "failed", "cancelled"):
                self._moved.set()
        elif self._plugger is not None:
            self._plugger.on_event(event)

    def _add_boot_device(self, device: Device) -> DeviceAddress:
        listen_fd = None
        place = None
        address = DeviceAddress()
        if isinstance(device, ConsoleDevice | SerialDevice):
            listen_fd = self._listen(device.id, device.socket)
            self._boot_fds.callback(os.close, listen_fd)
            self._pass_fds.append(listen_fd)
        elif _is_scsi_disk(device):
            raise UnsupportedError("virtio-scsi disks are added to a running VM only")
        else:
            place = self._layout.take_boot_slot(device.id)
            address = DeviceAddress(pci_path=place.path)
        self._boot_parts.append(
            devices.describe(self._with_own_fds(device), place, listen_fd=listen_fd)
        )
        self._boot_devices.append(device)
        return address

    async def _plug(self, device: Device) -> DeviceAddress:
        hot = self._hot
        if isinstance(device, ConsoleDevice | SerialDevice):
            listen_fd = self._listen(device.id, device.socket)
            try:
                await hot.plug(device.id, devices.describe(device, None, listen_fd=listen_fd))
            finally:
                os.close(listen_fd)
            return DeviceAddress()
        if _is_scsi_disk(device):
            return await self._plug_scsi(device)
        if isinstance(device, FsDevice | VsockDevice):
            place = self._layout.take_port(device.id)
        else:
            place = self._layout.take_bridge_slot(device.id)
        await hot.plug(device.id, devices.describe(device, place, fd_name=hotplug.fd_name))
        return DeviceAddress(pci_path=place.path)

    async def _plug_scsi(self, device: Device) -> DeviceAddress:
        hot = self._hot
        if devices.SCSI_ID not in self._device_ids:
            self._device_ids.add(devices.SCSI_ID)
            try:
                place = self._layout.take_bridge_slot(devices.SCSI_ID)
                await hot.plug(devices.SCSI_ID, devices.scsi_controller(place))
            except BaseException:
                self._forget_device(devices.SCSI_ID)
                raise
        target, lun = self._scsi.take(device.id)
        await hot.plug(device.id, devices.describe(device, None, scsi=(target, lun)))
        return DeviceAddress(scsi=f"{target}:{lun}")

    def _check_device(self, device: Device) -> None:
        kind = kind_of(device)
        if device.id in self._device_ids:
            raise VmmConfigError(f"{kind} device {device.id!r}: the id is taken")
        if isinstance(device, BlockDevice) and device.driver not in ("virtio-blk", "virtio-scsi"):
            raise UnsupportedError(f"disk driver {device.driver!r} is not supported by QEMU here")
        if isinstance(device, BlockDevice) and device.aio not in ("threads", "native", "io_uring"):
            raise VmmConfigError(f"disk {device.id!r}: unknown aio {device.aio!r}")
        vhost_user = isinstance(device, FsDevice) or (
            isinstance(device, VsockDevice) and device.socket is not None
        )
        if vhost_user and not self.config.shared_memory:
            raise UnsupportedError(f"a {kind} device needs a VM with shared memory")
        if isinstance(device, BalloonDevice) and self.config.private_memory:
            # QEMU gives pages back by holes in the file, which is every clone's.
            raise UnsupportedError("a VM with private memory has no balloon")

    def _forget_device(self, device_id: str) -> None:
        self._device_ids.discard(device_id)
        self._layout.release(device_id)
        self._scsi.release(device_id)
        if (path := self._sockets.pop(device_id, None)) is not None:
            path.unlink(missing_ok=True)

    def _with_own_fds(self, device: Device) -> Device:
        """The caller's descriptors stay its own: QEMU gets duplicates when it starts."""
        if isinstance(device, NetDevice):
            return replace(
                device,
                tap_fds=tuple(map(self._own_fd, device.tap_fds)),
                vhost_fds=tuple(map(self._own_fd, device.vhost_fds)),
            )
        if isinstance(device, VsockDevice) and device.vhost_fd is not None:
            return replace(device, vhost_fd=self._own_fd(device.vhost_fd))
        return device

    def _own_fd(self, fd: int) -> int:
        own = os.dup(fd)
        self._boot_fds.callback(os.close, own)
        self._pass_fds.append(own)
        return own

    def _listen(self, device_id: str, path: Path) -> int:
        """A bound, listening socket at `path`: whoever connects need not wait for QEMU."""
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise VmmConfigError(f"socket path {path} is longer than {MAX_SOCKET_PATH} bytes")
        self._make_state_dir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(str(path))
                os.chmod(path, 0o600)
                listener.listen(8)
            except OSError as error:
                raise VmmConfigError(f"socket {path}: {error.strerror}") from error
            self._sockets[device_id] = path
            return listener.detach()

    def _make_state_dir(self) -> None:
        try:
            self.config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise VmmConfigError(f"state directory {error.filename}: {error.strerror}") from error

    def _clean_up(self) -> None:
        """Give back all that has a name or a number on the host."""
        self._boot_fds.close()
        for path in self._sockets.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._sockets.clear()
        shutil.rmtree(self.config.state_dir, ignore_errors=True)


def _log_line(line: str) -> None:
    log.info("qemu: %s", line)


def _is_scsi_disk(device: Device) -> bool:
    return isinstance(device, BlockDevice) and device.driver == "virtio-scsi"


def _check_file(what: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise VmmConfigError(f"{what} {path}: {error.strerror}") from error
