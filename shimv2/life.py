# SPDX-License-Identifier: Apache-2.0
"""The life of one VM of a sandbox, from launch to the last of its processes gone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from agent.api import agent_pb2
from shimv2.config import Config
from shimv2.drives import Drives
from shimv2.guest import Guest
from shimv2.machine import CloneError, concurrently
from shimv2.network.pod_network import PodNetwork
from shimv2.network.port_forward import forward_ports
from shimv2.network.traces import Trace
from shimv2.placement import SandboxPlacement
from shimv2.resources import Demand
from shimv2.sizing import Sizing
from shimv2.vm_settings import fixed_size, network_settings
from ttrpc.errors import Code, RpcError
from vmm.errors import single_error

if TYPE_CHECKING:
    from shimv2.factory.templates import Templates
    from shimv2.sandbox import Sandbox

log = logging.getLogger("sandbox")

_WRITE_BACK_LIMIT = 30.0  # seconds for the guest to write what its disks do not have yet


@dataclass(frozen=True, slots=True)
class Origin:
    """What a VM is launched from; another origin needs another VM.

    Attributes:
        netns: path of the pod's network namespace, "" for one of our own.
        cgroups_path: the OCI spec's, "" for none.
        dns: lines of the pod's resolv.conf.
        sysctls: (name, value) that hold for every container.
        storages: of CreateSandbox: the share and the pod's /dev/shm.
        workload: what all its containers will ask for, where the VM has one size for good.
    """

    config: Config
    netns: str
    hostname: str
    cgroups_path: str
    dns: tuple[str, ...]
    sysctls: tuple[tuple[str, str], ...]
    storages: tuple[agent_pb2.Storage, ...]
    workload: Demand | None = None


class Life:
    """Runs as one task, `run`; everyone else asks `guest` or `stop`.

    Attributes:
        netns: path of the pod's network namespace on the host, once `run` has begun.
        sizing, drives: None until the guest is up.
    """

    def __init__(self, sandbox: Sandbox, origin: Origin) -> None:
        self.origin = origin
        self.netns = ""
        self._sandbox = sandbox
        self.sizing: Sizing | None = None
        self.drives: Drives | None = None
        self._guest: Guest | None = None
        self._network: PodNetwork | None = None
        self._placement: SandboxPlacement | None = None
        self._failure: Exception | None = None
        self._decided = trio.Event()  # booted, or failed
        self._ending = False  # somebody asked for its end; now or soon it is stopped
        self._lost = ""  # why it ended, where nobody had asked for it
        self._stop = trio.Event()
        self._ended = trio.Event()

    @property
    def is_running(self) -> bool:
        return self._guest is not None and not self._ended.is_set() and not self._ending

    @property
    def was_stopped(self) -> bool:
        """Somebody asked for its end."""
        return self._ending

    async def guest(self) -> Guest:
        """The booted guest; waits for the end of the boot.

        Raises:
            VmmError, RpcError: why there is none.
        """
        await self._decided.wait()
        if self._failure is not None:
            raise self._failure
        if self._guest is None or self._ended.is_set():
            raise RpcError(Code.UNAVAILABLE, f"the VM of sandbox {self._sandbox.id!r} has ended")
        return self._guest

    def require_running(self) -> None:
        """Raises UNAVAILABLE once the VM has ended or is about to."""
        if not self.is_running:
            raise RpcError(Code.UNAVAILABLE, f"the VM of sandbox {self._sandbox.id!r} has ended")

    async def update_network(self) -> None:
        """See that the guest has what was put into the pod's network namespace up to now.

        Raises:
            OSError, VmmError, RpcError: it can't have it.
        """
        guest = await self.guest()
        assert self._network is not None
        await self._network.configure(guest)

    async def stop(self) -> None:
        """End the VM, however far it is, and wait until its processes are gone."""
        if not self._ending:
            write_back = self.is_running and self.drives is not None and self.drives.written
            self._ending = True
            if write_back:
                await self._write_back()
            self._stop.set()
        await self._ended.wait()

    async def _write_back(self) -> None:
        """What the guest has of disks in its memory goes with the VM: it unmounts them first."""
        assert self._guest is not None
        with trio.CancelScope(shield=True):
            try:
                request = agent_pb2.DestroySandboxRequest()
                await self._guest.call("DestroySandbox", request, limit=_WRITE_BACK_LIMIT)
            except RpcError as error:
                log.warning("the guest did not unmount its disks: %s", error.message)

    async def run(self) -> None:
        """Boot, watch, end.  Never raises: what goes wrong is told to who asks for the guest."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_stop, nursery)
                await self._live()
                nursery.cancel_scope.cancel()
        except Exception as error:
            cause = single_error(error) if isinstance(error, BaseExceptionGroup) else error
            reason = str(cause) or type(cause).__name__
            self._failure = cause
            if not self._ending:
                self._lost = self._lost or reason
            what = "failed" if self._decided.is_set() else "did not start"
            log.error("the VM %s: %s", what, reason, exc_info=cause)
        finally:
            self._decided.set()
            self._ended.set()
            self._sandbox.life_ended(self, self._lost)

    async def _end_on_stop(self, nursery: trio.Nursery) -> None:
        await self._stop.wait()
        # What takes longest begins first, beside all else that is let go of.
        if self._guest is not None:
            nursery.start_soon(self._guest.halt)
        if self._placement is not None:
            nursery.start_soon(self._placement.leave)
        nursery.cancel_scope.cancel()

    async def _live(self) -> None:
        origin, sandbox = self.origin, self._sandbox
        with SandboxPlacement(sandbox.id, origin) as placement:
            self.netns, self._placement = placement.netns_path, placement
            sandbox.remember_cgroups(placement.cgroup_dirs)
            templates = _templates(origin.config)
            while True:
                try:
                    await self._live_in(placement, templates)
                    return
                except CloneError as error:
                    log.warning("%s", error)
                    assert templates is not None
                    templates = templates.what_is_left()

    async def _live_in(self, placement: SandboxPlacement, templates: Templates | None) -> None:
        origin, sandbox = self.origin, self._sandbox
        fixed = fixed_size(origin.config, origin.workload) if origin.workload else None
        async with (
            PodNetwork(
                placement.netns_fd,
                network_settings(origin.config, fixed),
                # A namespace of our own takes along what is in it.
                partial(sandbox.remember_traces, origin.netns) if origin.netns else _no_traces,
            ) as network,
            concurrently() as booting,
            Guest(
                origin.config,
                sandbox.id,
                placement=placement.vmm,
                timeline=sandbox.timeline,
                on_process=sandbox.remember_process,
                fixed=fixed,
            ) as guest,
        ):
            storages, dns = list(origin.storages), list(origin.dns)
            booting.start_soon(network.plug, guest)
            await guest.boot(storages, origin.hostname, dns, templates)
            sizing = Sizing(origin.config, guest, placement, fixed)
            async with concurrently() as nursery:
                nursery.start_soon(sizing.settle)
                await network.configure(guest)
            sandbox.timeline.mark("network")
            self._guest, self._network, self.sizing = guest, network, sizing
            self.drives = Drives(origin.config.hypervisor, guest)
            log.info("guest is up: %s", sandbox.timeline)
            self._decided.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_place_vcpus, placement, guest)
                nursery.start_soon(sandbox.watch_oom, guest)
                nursery.start_soon(network.follow, guest)
                if origin.netns and not origin.config.runtime.disable_new_netns:
                    nursery.start_soon(forward_ports, placement.netns_fd, guest.connect_forward)
                if templates is not None:
                    nursery.start_soon(templates.make_beside, sandbox.settings.host_mounts)
                reason = await guest.wait_lost()
                if not self._ending:  # what fails by it asks for the end, maybe before we are out
                    self._lost = reason
                nursery.cancel_scope.cancel()


async def _place_vcpus(placement: SandboxPlacement, guest: Guest) -> None:
    await placement.add_vcpu_threads(await guest.vcpu_threads())


def _no_traces(_: list[Trace]) -> None:
    """Nothing has to be remembered."""


def _templates(config: Config) -> Templates | None:
    if not config.factory.enable_template and not config.factory.vm_cache_number:
        return None
    from shimv2.factory.templates import Templates, possible

    return Templates(config) if possible(config) else None
