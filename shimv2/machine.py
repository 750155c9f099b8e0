# SPDX-License-Identifier: Apache-2.0
"""The VM of a sandbox with what serves its devices: virtiofsd and the vsock channel.

It knows nothing of what runs in the guest.  Leaving its ``async with`` block ends all of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from shimv2.config import Config
from shimv2.console import copy_console
from shimv2.resources import Size
from shimv2.state import share_dir, vm_dir
from shimv2.timeline import Timeline
from shimv2.vm_settings import SHARE_TAG, virtiofs_socket, vm_config
from vmm.errors import VmmError, VmmGoneError, ungrouped
from vmm.hypervisor import (
    BalloonDevice,
    ConsoleDevice,
    Device,
    FsDevice,
    Handover,
    Hypervisor,
    Placement,
    RngDevice,
)
from vmm.process import HelperProcess
from vmm.qemu.driver import Qemu
from vmm.template import Template
from vmm.virtiofsd import Virtiofsd
from vmm.vsock import VsockChannel, open_channel
from vmm.vsock.vhost import FIRST_CID

log = logging.getLogger("guest")

_HOLDER = ("/bin/sleep", "infinity")


class CloneError(VmmError):
    """A template could not be used; the same sandbox may still boot."""


class Machine:
    """One VM, by a boot or as the clone of a template.

    Args:
        config: the sandbox's configuration, annotations applied.
        sandbox_id: names the state directories.
        placement: the pod's network namespace and the sandbox's cgroups.
        timeline: gets a mark at each phase.
        on_process: called with (name, pid) for each helper as soon as it runs.
        pooled: it is made for the VM cache: without a share, and to be handed over.
        fixed: the size that a boot gives it for good; None where it is to grow.

    Attributes:
        daemon: virtiofsd, or None without a share.
        holder: a process in the pod's network namespace, where the VMM is not in it.
        launched: devices can be plugged; the guest need not run yet.
    """

    def __init__(
        self,
        config: Config,
        sandbox_id: str,
        *,
        placement: Placement,
        timeline: Timeline,
        on_process: Callable[[str, int], None],
        pooled: bool = False,
        fixed: Size | None = None,
    ) -> None:
        self._config = config
        self._id = sandbox_id
        self._placement = placement
        self._timeline = timeline
        self._on_process = on_process
        self._directory = vm_dir(sandbox_id)
        self._stack = contextlib.AsyncExitStack()
        self._nursery: trio.Nursery
        self._vm: Hypervisor | None = None
        self._channel: VsockChannel | None = None
        self._pooled = pooled
        self._fixed = fixed
        self.daemon: Virtiofsd | None = None
        self.holder: HelperProcess | None = None
        self.launched = trio.Event()

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(own_nursery())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        await self._stack.aclose()

    async def stop(self) -> None:
        """Kill the VM at once, if there is one."""
        if self._vm is not None:
            await self._vm.stop()

    @property
    def vm(self) -> Hypervisor:
        """Raises VmmGoneError before any start."""
        if self._vm is None:
            raise VmmGoneError("there is no VM yet")
        return self._vm

    @property
    def channel(self) -> VsockChannel:
        """Raises VmmGoneError before any start."""
        if self._channel is None:
            raise VmmGoneError("there is no VM yet")
        return self._channel

    def mark_gone(self, reason: str) -> None:
        """Whoever waits for a connection to the guest need not wait any longer."""
        if self._channel is not None:
            self._channel.mark_gone(reason)

    # --- the ways to start ----------------------------------------------------------------

    async def boot(self) -> None:
        """From power on, all devices there at once.

        Raises:
            VmmError: names what could not be started, with its last lines of stderr.
        """
        vm = await self.prepare(clonable=False)
        channel = await self._open_channel()
        await vm.add_device(channel.device)
        if self._shares:
            share = await self._open_virtiofsd()
            await self._start_virtiofsd()
            await vm.add_device(share)
        self._timeline.mark("prepared")
        await vm.start()
        self._started(vm)

    async def clone(self, template: Template) -> None:
        """From a template, after `prepare`; what belongs to this sandbox alone is plugged before
        the guest goes on.

        Raises:
            VmmError: the template can't be used.
        """
        vm = self.vm
        channel = await self._open_channel()
        devices: list[Device] = [channel.device]
        if self._shares:
            devices.append(await self._open_virtiofsd())
        async with concurrently() as nursery:
            if self._shares:
                nursery.start_soon(self._start_virtiofsd)
            await vm.restore(template.directory)  # QEMU first, which takes longer to start
        await self._go_on(vm, "template", devices)

    async def adopt(self, handover: Handover) -> None:
        """From the VM cache: it is there, paused, with our name on its state directory.

        Raises:
            VmmError: it was lost, or can't have this sandbox's devices.
        """
        with contextlib.ExitStack() as unless_adopted:
            for fd in handover.descriptors:  # with the last copy of them the VM goes
                unless_adopted.callback(os.close, fd)
            config = vm_config(self._config, self._id, self._placement, clonable=True, kept=True)
            vm: Hypervisor = await self._stack.enter_async_context(Qemu(config))
            self._vm = vm
            await vm.check()
            unless_adopted.pop_all()
        await vm.adopt(handover)
        self._move_in(handover.pids)
        channel = await self._open_channel()
        devices: list[Device] = [channel.device]
        if self._shares:
            devices.append(await self._open_virtiofsd())
            await self._start_virtiofsd()
        await self._go_on(vm, "cache", devices)
        self._start_holder()

    async def _go_on(self, vm: Hypervisor, kind: str, devices: list[Device]) -> None:
        """Plug what is this sandbox's own into a VM that is paused, and let it run."""
        self._timeline.kind = kind
        self._timeline.mark("prepared")
        self.launched.set()
        for device in devices:
            await vm.add_device(device)
        await vm.resume()
        self._started(vm)

    def _move_in(self, pids: tuple[int, ...]) -> None:
        """Into the sandbox's cgroups; what the VM has used so far stays with the cache's."""
        for procs in self._placement.cgroup_procs:
            for pid in pids:
                try:
                    procs.write_text(str(pid))
                except OSError as error:
                    raise VmmError(f"cgroup {procs}: {error.strerror}") from error

    def _start_holder(self) -> None:
        """Whoever asks for the sandbox's process looks for the pod's network in it."""
        self.holder = HelperProcess(_HOLDER, name="namespace holder", placement=self._placement)
        self.holder.start(self._nursery)
        self._on_process("holder", self.holder.pid)

    async def put_aside(self) -> None:
        """Take away what belongs to this process, and stop the guest: `release` may follow."""
        device = self.channel.device
        await self.vm.remove_device(device.id)
        await self.vm.pause()
        if device.socket is not None:  # its place is the next owner's
            device.socket.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def rehearsal_share(self) -> AsyncIterator[None]:
        """An empty share, plugged for a while into a VM that is to have a sandbox's own later.

        Raises:
            VmmError: it can't be plugged, or the guest does not let it go.
        """
        directory = self._directory / "empty"
        directory.mkdir()
        daemon, device = self._share_of(directory)
        async with daemon:
            await daemon.start()
            await self.vm.add_device(device)
            yield
            await self.vm.remove_device(device.id)
        directory.rmdir()

    async def boot_template(self) -> None:
        """After `prepare`; with nothing that could not be saved but the channel, which goes in
        `save`."""
        await self.vm.start()
        self._started(self.vm)
        channel = await self._open_channel()
        await self.vm.add_device(channel.device)

    async def save(self, directory: Path) -> None:
        """Stop the guest where it is and write it down; `boot_template` came before."""
        await self.put_aside()
        await self.vm.save(directory)

    async def prepare(self, *, clonable: bool) -> Hypervisor:
        """A VM with the devices that all ways of starting have in common, checked, not running."""
        config = vm_config(
            self._config,
            self._id,
            self._placement,
            clonable=clonable,
            kept=self._pooled,
            fixed=None if clonable else self._fixed,  # a clone has the size of its template
        )
        vm: Hypervisor = await self._stack.enter_async_context(Qemu(config))
        self._vm = vm
        await vm.prepare()
        source = self._config.hypervisor.entropy_source
        await vm.add_device(RngDevice(id="rng0", source=source))
        await vm.add_device(ConsoleDevice(id="console0", socket=self._console))
        if self._config.hypervisor.reclaim_guest_freed_memory:
            await vm.add_device(BalloonDevice(id="balloon0"))
        return vm

    @property
    def _console(self) -> Path:
        return self._directory / "console.sock"

    @property
    def _shares(self) -> bool:
        return self._config.hypervisor.shared_fs != "none" and not self._pooled

    async def _open_channel(self) -> VsockChannel:
        # Nothing but our own device looks at its CID; still no two guests have the same.
        cid = FIRST_CID + int.from_bytes(os.urandom(4), "little") % (1 << 30)
        channel = open_channel(self._config.hypervisor.vsock, self._directory, cid=cid)
        channel.on_driver_up = partial(self._timeline.mark, "driver-up")
        self._channel = await self._stack.enter_async_context(channel)
        return channel

    async def _open_virtiofsd(self) -> FsDevice:
        daemon, device = self._share_of(share_dir(self._id) / "shared")
        self.daemon = await self._stack.enter_async_context(daemon)
        return device

    def _share_of(self, directory: Path) -> tuple[Virtiofsd, FsDevice]:
        hypervisor = self._config.hypervisor
        socket = virtiofs_socket(self._id)
        daemon = Virtiofsd(
            hypervisor.virtio_fs_daemon,
            directory,
            socket,
            cache=hypervisor.virtio_fs_cache,
            extra_args=hypervisor.virtio_fs_extra_args,
            placement=Placement(cgroup_procs=self._placement.cgroup_procs),
        )
        queue_size = hypervisor.virtio_fs_queue_size or 1024
        return daemon, FsDevice(id="fs0", tag=SHARE_TAG, socket=socket, queue_size=queue_size)

    async def _start_virtiofsd(self) -> None:
        assert self.daemon is not None
        await self.daemon.start()
        self._on_process("virtiofsd", self.daemon.pid)

    def _started(self, vm: Hypervisor) -> None:
        self.launched.set()
        self._on_process("vmm", vm.pid)
        self._timeline.mark("vmm-started")
        self._timeline.accelerator = vm.accelerator.value
        self._nursery.start_soon(copy_console, self._console, _console_line)


def _console_line(line: str) -> None:
    log.debug("console: %s", line)


@contextlib.asynccontextmanager
async def own_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled when its block ends."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def concurrently() -> AsyncIterator[trio.Nursery]:
    """A nursery whose first error comes out as it is, not in a group."""
    with ungrouped():
        async with trio.open_nursery() as nursery:
            yield nursery
