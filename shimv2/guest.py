# SPDX-License-Identifier: Apache-2.0
"""The running VM with the agent in it: booted, talked to, watched, ended.

`Guest` owns everything a sandbox has outside the shim's own memory: the VMM, virtiofsd, the
vsock channel, the agent connection.  Leaving its ``async with`` block ends all of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio
from google.protobuf.message import Message

from agent.api import agent_pb2, health_pb2
from shimv2.config import Config
from shimv2.host_clock import HostClock
from shimv2.machine import Machine, concurrently, own_nursery
from shimv2.metrics.durations import Durations
from shimv2.resources import Size
from shimv2.state import vm_dir
from shimv2.stats import add_stats
from shimv2.streams import ProcessStreams, RpcReader, RpcWriter, SocketReader, SocketWriter
from shimv2.timeline import Timeline
from shimv2.version import VERSION
from ttrpc.client import Client
from ttrpc.errors import Code, ConnectionLost, RpcError
from vmm.errors import VmmError, VmmGoneError
from vmm.hypervisor import (
    Device,
    DeviceAddress,
    Handover,
    Hypervisor,
    Placement,
    VsockDevice,
)
from vmm.vsock import VsockChannel, VsockConnection, VsockNoAnswer, VsockRefused

if TYPE_CHECKING:
    from shimv2.factory.templates import Templates

log = logging.getLogger("guest")

AGENT_PORT = 1024
STREAM_PORT = 1027
FORWARD_PORT = 1028

_RPC_LIMIT = 30.0  # seconds for every call that doesn't wait for a process
_DIAL_LIMIT = 45
_CLONE_LIMIT = 15.0  # an emulated clone on a busy host needs one second
_END_LIMIT = 2.0
_HEALTH_EVERY = 5.0
_HEALTH_LIMIT = 10.0
_VERSION_LIMIT = 1.0
_HEALTH_TRIES = 2
_CLOCK_EVERY = 60.0
_MESSAGE_LIMIT = 4096  # characters
_RESEED_BYTES = 512  # what Kata sends after a clone

_AGENT = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


class Guest:
    """One VM with its agent.

    Args:
        config: the sandbox's configuration, annotations applied.
        sandbox_id: names the state directories.
        placement: the pod's network namespace and the sandbox's cgroups.
        timeline: gets a mark at each phase of the boot.
        on_process: called with (name, pid) for each helper as soon as it runs.
        pooled, fixed: see `Machine`.

    Attributes:
        durations: of the calls to the agent, by the types of their requests.
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
        self._timeline = timeline
        self._machine = Machine(
            config,
            sandbox_id,
            placement=placement,
            timeline=timeline,
            on_process=on_process,
            pooled=pooled,
            fixed=fixed,
        )
        self._stack = contextlib.AsyncExitStack()
        self._nursery: trio.Nursery
        self._client: Client
        self._lost = trio.Event()
        self._lost_reason = ""
        self._raw_streams = True
        self.durations = Durations()

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(own_nursery())
        await self._stack.enter_async_context(self._machine)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.halt()
        finally:
            await self._stack.aclose()

    async def halt(self) -> None:
        """End the VM at once, whatever the guest does.  Idempotent."""
        self.declare_lost("the sandbox is stopped")
        await self._machine.stop()

    # --- boot ---------------------------------------------------------------------------

    async def boot(
        self,
        storages: list[agent_pb2.Storage],
        hostname: str,
        dns: list[str],
        templates: Templates | None = None,
    ) -> None:
        """Start everything and create the sandbox in the guest.

        Args:
            templates: where to look for a VM that is ready, or one to clone.

        Raises:
            CloneError: there is one, but it is of no use; another Guest may boot.
            VmmError: names what could not be started, with its last lines of stderr.
            RpcError: the agent refused the sandbox.
        """
        if templates is not None and await self._continue_one(templates):
            async with concurrently() as nursery:
                nursery.start_soon(self.become_another)
                await self._create_sandbox(storages, hostname, dns)
        else:
            await self._machine.boot()
            await self._connect(self._config.agent.dial_timeout or _DIAL_LIMIT)
            await self._create_sandbox(storages, hostname, dns)
        self._timeline.mark("sandbox-created")
        self._nursery.start_soon(self._watch_health)
        self._nursery.start_soon(self._keep_time)
        await self._machine.channel.serve_hybrid(vm_dir(self._id) / "hybrid.sock")

    async def _continue_one(self, templates: Templates) -> bool:
        """Go on with a VM that was booted before; False if there is none."""
        found = await templates.take(self._machine, self._id)
        if not found and templates.may_clone:
            found = await templates.clone(self._machine)
        if not found:
            return False
        try:
            await self._connect(_CLONE_LIMIT)
        except VmmError as error:
            raise templates.failed(error) from error
        return True

    async def boot_bare(self, templates: Templates) -> None:
        """Go on with a clone up to an agent that answers, for the VM cache.

        Raises:
            VmmError: there is no template, or it can't be used.
        """
        if not await templates.clone(self._machine):
            raise VmmError("there is no template to clone")
        await self._connect(_CLONE_LIMIT)

    async def rehearse(self, storages: list[agent_pb2.Storage]) -> None:
        """Have a guest of `boot_bare` make a sandbox with a share, and unmake it, so that its
        kernel and its agent have done it before it counts.

        Raises:
            VmmError, RpcError: it can't; a real sandbox would fail too.
        """
        if self._config.hypervisor.shared_fs == "none":
            return
        async with self._machine.rehearsal_share():
            await self._create_sandbox(storages, "", [])
            await self.call("DestroySandbox", agent_pb2.DestroySandboxRequest())

    async def put_aside(self) -> None:
        """The guest of `boot_bare` waits for its next owner."""
        await self._machine.put_aside()

    def release(self) -> Handover:
        """Give the VM of `put_aside` away; it is of no further use here.

        Raises:
            VmmError: it is gone.
        """
        return self._machine.vm.release()

    @property
    def pid(self) -> int:
        """The VMM's.  Raises VmmGoneError."""
        return self._machine.vm.pid

    async def wait_vm_gone(self) -> None:
        """Until the VMM has ended."""
        await self._machine.vm.wait()

    async def boot_template(self) -> None:
        """Start what can be saved, up to an agent that answers and no sandbox in it.

        Raises:
            VmmError, RpcError: it could not be started.
        """
        await self._machine.prepare(clonable=True)
        await self._machine.boot_template()
        await self._connect(self._config.agent.dial_timeout or _DIAL_LIMIT)

    async def save(self, directory: Path) -> None:
        """Write the guest of `boot_template` down; it is of no further use here."""
        await self._machine.save(directory)

    async def _connect(self, limit: float) -> None:
        """Wait for the agent, and watch from now on what the guest depends on."""
        machine = self._machine
        self._nursery.start_soon(self._watch, "the VMM", machine.vm.wait)
        if machine.daemon is not None:
            self._nursery.start_soon(self._watch, "virtiofsd", machine.daemon.wait)
        if machine.holder is not None:
            self._nursery.start_soon(self._watch, "the namespace holder", machine.holder.wait)
        self._client = await self._connect_agent(machine.channel, limit)
        self._nursery.start_soon(self._watch, "the agent's connection", self._client.wait_closed)
        self._timeline.mark("agent-connected")

    async def become_another(self) -> None:
        """Tell a clone's guest that it is one: new random numbers, a new machine id."""
        data = os.urandom(_RESEED_BYTES)
        await self.call("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=data))

    async def _connect_agent(self, channel: VsockChannel, limit: float) -> Client:
        try:
            connection = await channel.connect_when_ready(AGENT_PORT, timeout=limit)
        except VsockRefused as error:
            raise VmmError(f"the agent does not answer: {error}") from error
        except VmmGoneError:
            # Why the VM is gone is known to who watches it, a moment later at the most.
            with trio.move_on_after(_END_LIMIT):
                raise VmmGoneError(await self.wait_lost()) from None
            raise
        return await self._stack.enter_async_context(Client(connection.stream))

    async def _create_sandbox(
        self, storages: list[agent_pb2.Storage], hostname: str, dns: list[str]
    ) -> None:
        await self.set_time()
        self._timeline.mark("agent-answers")
        await self.call(
            "CreateSandbox",
            agent_pb2.CreateSandboxRequest(
                hostname=hostname[:64],
                dns=dns,
                storages=storages,
                sandbox_id=self._id,
                sandbox_pidns=True,  # the agent makes one, if containers want to share it
                guest_hook_path=self._config.hypervisor.guest_hook_path,
                kernel_modules=[_module(text) for text in self._config.agent.kernel_modules],
            ),
        )

    # --- talking ------------------------------------------------------------------------

    async def call(self, method: str, request: Message, limit: float = _RPC_LIMIT) -> Any:
        """One call to the agent, with a deadline.

        Raises:
            RpcError: the agent's status; UNAVAILABLE once the guest is lost.
        """
        if self._lost.is_set():
            raise RpcError(Code.UNAVAILABLE, f"the guest is lost: {self._lost_reason}")
        try:
            with self.durations.of(request.DESCRIPTOR.full_name):
                return await getattr(self._client.stub(_AGENT), method)(request, timeout=limit)
        except RpcError as error:
            if isinstance(error, ConnectionLost) and self._lost.is_set():
                message = f"the guest is lost: {self._lost_reason}"
                raise RpcError(Code.UNAVAILABLE, message) from None
            raise RpcError(error.code, _clipped(error.message)) from None

    async def is_healthy(self, limit: float) -> bool:
        """Whether the agent answers within `limit` seconds."""
        try:
            await self._client.stub(_HEALTH).Check(health_pb2.CheckRequest(), timeout=limit)
        except RpcError:
            return False
        return True

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        """The exit status of a process, however long it takes.

        Raises:
            RpcError: the guest is lost, or it knows no such process.
        """
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        reply = await self._client.stub(_AGENT).WaitProcess(request)
        status: int = reply.status
        return status

    async def next_oom(self) -> str:
        """The id of the next container in which the guest's kernel killed for memory."""
        reply = await self._client.stub(_AGENT).GetOOMEvent(agent_pb2.GetOOMEventRequest())
        return str(reply.container_id)

    async def open_streams(
        self, container_id: str, exec_id: str, *, stdin: bool, stderr: bool
    ) -> ProcessStreams:
        """A stream for each stdio: raw vsock, else by RPC (DESIGN decision 6)."""
        streams = ProcessStreams()
        if self._raw_streams:
            found = await self._connect_streams(1 + stdin + stderr)
            if found:
                streams.stdout = SocketReader(found.pop())
                streams.stdin = SocketWriter(found.pop()) if stdin else None
                streams.stderr = SocketReader(found.pop()) if stderr else None
                return streams
            log.info("the agent has no raw streams: stdio goes by RPC")
            self._raw_streams = False
        if stdin:
            streams.stdin = RpcWriter(self.call, container_id, exec_id)
        streams.stdout = RpcReader(self._read, "ReadStdout", container_id, exec_id)
        if stderr:
            streams.stderr = RpcReader(self._read, "ReadStderr", container_id, exec_id)
        return streams

    async def _connect_streams(self, count: int) -> list[VsockConnection]:
        """So many connections to the stream port, made at the same time; none if it is closed.
        A guest that does not answer has time until it counts as lost."""
        channel = self._machine.channel
        found: list[VsockConnection] = []

        async def connect() -> None:
            while True:
                try:
                    found.append(await channel.connect(STREAM_PORT))
                except VsockNoAnswer:
                    if not self._lost.is_set():
                        continue
                except VsockRefused:
                    pass
                return

        try:
            async with concurrently() as nursery:
                for _ in range(count):
                    nursery.start_soon(connect)
        except BaseException:
            await _close_all(found)
            raise
        if len(found) < count:
            await _close_all(found)
            return []
        return found

    async def _read(self, method: str, request: Message) -> Any:
        # Waits as long as the process is silent, so it has no deadline.
        return await getattr(self._client.stub(_AGENT), method)(request)

    async def sandbox_stats(self, container_ids: list[str]) -> agent_pb2.StatsContainerResponse:
        """The sum over containers; one that has just ended counts nothing."""
        total = agent_pb2.StatsContainerResponse()
        for container_id in container_ids:
            with contextlib.suppress(RpcError):
                add_stats(
                    total,
                    await self.call(
                        "StatsContainer", agent_pb2.StatsContainerRequest(container_id=container_id)
                    ),
                )
        return total

    @property
    def vm(self) -> Hypervisor:
        """Raises VmmGoneError before any start."""
        return self._machine.vm

    async def add_device(self, device: Device) -> DeviceAddress:
        """Plug a device, as soon as the VM is launched; its guest may still be booting.

        Raises:
            VmmError: the VM can't have it.
        """
        await self._machine.launched.wait()
        return await self._machine.vm.add_device(device)

    async def remove_device(self, device_id: str) -> None:
        """Unplug a device.

        Raises:
            VmmError: there is none, or the guest does not let it go.
        """
        await self._machine.vm.remove_device(device_id)

    async def connect_forward(self) -> VsockConnection:
        """A connection to the agent's port for forwarding (agent/forward.py says how it speaks).

        Raises:
            VsockRefused: the agent has none.
            VmmGoneError: the guest is gone.
        """
        return await self._machine.channel.connect(FORWARD_PORT)

    async def vcpu_threads(self) -> list[int]:
        """Host thread ids of the VM's processors; none once it is gone."""
        try:
            return list((await self._machine.vm.metrics()).vcpu_threads.values())
        except VmmError:
            return []

    @property
    def agent_url(self) -> str:
        """Where another program of this host reaches the agent, as Kata writes it."""
        device = self._machine.channel.device
        if isinstance(device, VsockDevice) and device.vhost_fd is not None:
            return f"vsock://{device.cid}:{AGENT_PORT}"
        return f"hvsock://{vm_dir(self._id)}/hybrid.sock:{AGENT_PORT}"

    @property
    def vsock_bytes(self) -> tuple[int, int] | None:
        """Payload to the guest and from it, where the vsock device is one that can tell."""
        return self._machine.channel.payload

    async def facts(self) -> dict[str, str]:
        """About the VM and who runs in it, for SandboxStatus and for people."""
        vm = self._machine.vm
        figures = await vm.metrics()
        return {
            "runtime": VERSION,
            "agent": await self._agent_version(),
            "vmm": f"{vm.name} {vm.version}",
            "accelerator": vm.accelerator.value,
            "pid": str(vm.pid),
            "vcpus": str(figures.vcpus),
            "memory_mib": str(figures.memory_mib),
            "rss_bytes": str(figures.rss_bytes),
        }

    async def _agent_version(self) -> str:
        """Empty if the agent does not answer soon."""
        health = self._client.stub(_HEALTH)
        try:
            reply = await health.Version(health_pb2.CheckRequest(), timeout=_VERSION_LIMIT)
        except RpcError:
            return ""
        return _clipped(reply.agent_version)

    # --- the end ------------------------------------------------------------------------

    async def wait_lost(self) -> str:
        """Return when the guest can no longer be used, with the reason."""
        await self._lost.wait()
        return self._lost_reason

    def declare_lost(self, reason: str) -> None:
        """From now on every call fails at once.  The first reason counts."""
        if not self._lost.is_set():
            self._lost_reason = reason
            self._lost.set()
            self._machine.mark_gone(reason)

    async def _watch(self, what: str, end: Callable[[], Awaitable[object]]) -> None:
        self.declare_lost(f"{what} ended: {await end()}")

    async def _watch_health(self) -> None:
        check = health_pb2.CheckRequest()
        failures = 0
        while failures < _HEALTH_TRIES:
            if not failures:
                await trio.sleep(_HEALTH_EVERY)
            try:
                await self._client.stub(_HEALTH).Check(check, timeout=_HEALTH_LIMIT)
                failures = 0
            except RpcError as error:
                failures += 1
                log.warning("health check %d of %d: %s", failures, _HEALTH_TRIES, error.message)
        self.declare_lost(f"the guest did not answer {_HEALTH_TRIES} health checks")

    async def _keep_time(self) -> None:
        with HostClock() as clock:
            while True:
                with trio.move_on_after(_CLOCK_EVERY):
                    await clock.wait_set()
                with contextlib.suppress(RpcError):
                    await self.set_time()

    async def set_time(self) -> None:
        """Set the guest's clock by ours."""
        now = time.time_ns()
        await self.call(
            "SetGuestDateTime",
            agent_pb2.SetGuestDateTimeRequest(
                Sec=now // 1_000_000_000, Usec=now % 1_000_000_000 // 1000
            ),
        )


def _clipped(message: str) -> str:
    """What the guest says of an error, fit for a log and for containerd."""
    text = "".join(c if c.isprintable() else " " for c in message[:_MESSAGE_LIMIT])
    return text if len(message) <= _MESSAGE_LIMIT else text + "…"


async def _close_all(connections: list[VsockConnection]) -> None:
    with trio.CancelScope(shield=True):
        for connection in connections:
            await connection.aclose()


def _module(text: str) -> agent_pb2.KernelModule:
    name, *parameters = text.split()
    return agent_pb2.KernelModule(name=name, parameters=parameters)
