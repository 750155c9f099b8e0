# SPDX-License-Identifier: Apache-2.0
"""One container of the sandbox: made, started, ended and removed in the guest.

Its state changes under `Container.lock`; only waiting for an exit happens outside it.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from agent.api import agent_pb2, oci_pb2
from shimv2.api import task_events_pb2, task_types_pb2
from shimv2.container_files import ContainerFiles
from shimv2.copies import Copies
from shimv2.guest_spec import (
    guest_resources,
    guest_spec,
    process_from_json,
    resources_from_json,
    resources_of,
)
from shimv2.hooks import ContainerState, run_hooks
from shimv2.process import LOST_STATUS, Process, State
from shimv2.spec import HookKind, Spec, SpecError
from shimv2.timestamps import put
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmError

if TYPE_CHECKING:
    from shimv2.guest import Guest
    from shimv2.life import Life, Origin
    from shimv2.sandbox import Sandbox
    from shimv2.streams import ProcessStreams

log = logging.getLogger("container")

_PROCESS_TYPE = "opencontainers/runtime-spec/1/Process"
_RESOURCES_TYPE = "opencontainers/runtime-spec/1/LinuxResources"

_RESOLV_CONF = "/etc/resolv.conf"
_SIGKILL = 9
_SIGNAL_LIMIT = 64
_KILLED_STATUS = 128 + _SIGKILL
_SIGKILL_LIMIT = 4.0  # seconds for the guest to take a SIGKILL
_HEALTH_LIMIT = 2.0  # and then to answer at all
_LOSS_LIMIT = 2.0  # from a lost guest to the exit of what ran in it
_ABANDON_LIMIT = 5.0  # for the guest to forget a container whose Create failed
_EXEC_WAIT = 1.0  # seconds that the exit of init waits for its execs to report theirs
_CREATE_LIMIT = 60.0  # seconds, where create_container_timeout doesn't say


class Container:
    """A container that Create made.

    Attributes:
        spec: the validated OCI spec.
        paused: its guest cgroup is frozen.
        files: what it has of the host's storage, while it has.
    """

    def __init__(self, sandbox: Sandbox, spec: Spec, bundle: str, init: Process) -> None:
        self.id = init.container_id
        self.bundle = bundle
        self.spec = spec
        self.init = init
        self.execs: dict[str, Process] = {}
        self.paused = False
        self.lock = trio.Lock()
        self._sandbox = sandbox
        self._life: Life | None = None
        self.files: ContainerFiles | None = None
        self._in_guest = False  # or may be, for what we know
        self._hooks_ran = False
        self._deleted = False
        self._exec_requests: dict[str, agent_pb2.ExecProcessRequest] = {}

    # --- create and start ---------------------------------------------------------------

    async def create(self, life: Life, mounts: list[Any]) -> None:
        """Mount the root file system, share it, and create the container in the guest.

        Host work is done while the VM still boots.  On an error call `abandon`.
        """
        self._life = life
        self.spec.check_container()
        hypervisor = life.origin.config.hypervisor
        share = self._sandbox.share if hypervisor.shared_fs != "none" else Copies()
        files = self.files = ContainerFiles(
            share, self.spec, self.id, self.bundle, self._sandbox.id
        )
        files.mount(mounts, disks=not hypervisor.disable_block_device_use)
        self._sandbox.timeline.mark("rootfs-shared")
        guest = await life.guest()
        await self._run_create_hooks()
        streams = await self.init.open_streams(guest, self._sandbox.nursery)
        self._sandbox.timeline.mark("streams-open")
        try:
            converted = guest_spec(
                self.spec,
                root_path=files.root_path,
                mounts=files.mounts,
                seccomp=not life.origin.config.runtime.disable_guest_seccomp,
                swap=life.origin.config.hypervisor.enable_guest_swap,
            )
            _complete(converted.message, life.origin)
            if life.sizing is not None:
                await life.sizing.add(self.id, resources_of(self.spec))
            if converted.lost:
                log.warning("not carried to the guest: %s", ", ".join(converted.lost))
            if life.drives is not None:
                await files.plug(life.drives, converted.message)
                await files.copy(guest.call)
            limit = life.origin.config.runtime.create_container_timeout or _CREATE_LIMIT
            request = agent_pb2.CreateContainerRequest(
                container_id=self.id,
                exec_id=self.id,
                OCI=converted.message,
                storages=files.storages,
                devices=files.devices,
                sandbox_pidns=self.spec.sandbox_pidns,
            )
            streams.put_ports(request)
            self._in_guest = True
            await guest.call("CreateContainer", request, limit=limit)
        except BaseException:
            with trio.CancelScope(shield=True):
                await streams.aclose()
            raise
        self.init.stdio.start(streams.stdin, streams.stdout, streams.stderr, feed=False)

    async def _run_create_hooks(self) -> None:
        self._hooks_ran = True
        await self._run_hooks(HookKind.PRESTART, HookKind.CREATE_RUNTIME)

    async def abandon(self) -> None:
        """Undo a Create that failed, however far it was.  What fails here is logged."""
        try:
            with trio.move_on_after(_ABANDON_LIMIT):
                await self._remove_from_guest()
            await self.release()
            if self._hooks_ran:  # what the first ones set up, the last ones take away
                await self._run_hooks(HookKind.POSTSTOP)
        except Exception:
            log.exception("container %s: not all of a failed Create was undone", self.id)

    def watch(self) -> None:
        """From now on the end of init is seen, also of one that was never started."""
        self._sandbox.start_soon(self._watch_init)

    async def start(self) -> None:
        """Let init run."""
        async with self.lock:
            self.init.require("start", State.CREATED)
            guest = await self._guest()
            # Hooks, and `ctr run --cni`, set the network up between Create and Start.
            if self._life is not None:
                await self._life.update_network()
            # A caller that gave up leaves no process behind of which nobody knows.
            with trio.CancelScope(shield=True):
                await guest.call(
                    "StartContainer", agent_pb2.StartContainerRequest(container_id=self.id)
                )
            self.init.started()
            self.init.stdio.feed()
            self._sandbox.events.publish(
                task_events_pb2.TaskStart(container_id=self.id, pid=self._sandbox.pid)
            )
            await self._resize_first(guest, self.init)
        await self._run_hooks(HookKind.POSTSTART)

    async def _watch_init(self) -> None:
        try:
            guest = await self._guest()
        except (RpcError, VmmError) as error:
            log.warning("%s lost: %s", self.init.describe(), error)
            status = LOST_STATUS
        else:
            status = await self.init.wait_in_guest(guest)
        with trio.move_on_after(_EXEC_WAIT):
            for process in list(self.execs.values()):
                if process.state is State.RUNNING:
                    await process.exited.wait()
        async with self.lock:  # a Start under way publishes its event first
            self._exited(self.init, status)
        self._sandbox.init_exited(self)

    def _exited(self, process: Process, status: int) -> None:
        if process.state is State.STOPPED:
            return
        process.set_exited(status)
        if process is self.init and self._life is not None and self._life.sizing is not None:
            self._life.sizing.forget(self.id)
        event = task_events_pb2.TaskExit(
            container_id=self.id,
            id=process.exec_id or self.id,
            pid=self._sandbox.pid,
            exit_status=process.exit_status,
        )
        put(event.exited_at, process.exited_at)
        self._sandbox.events.publish(event)

    def guest_lost(self) -> None:
        """The VM is gone: what has not been reported as ended has ended with 255."""
        for process in self.processes():
            self._end(process, LOST_STATUS)

    def _end(self, process: Process, status: int) -> None:
        """Take it for ended; an exec that was never started has no exit event."""
        if process is self.init or process.state is State.RUNNING:
            self._exited(process, status)
        else:
            process.set_exited(status)

    # --- exec ---------------------------------------------------------------------------

    def add_exec(self, request: Any) -> None:
        """Exec: noted here; the guest learns of it at its start.

        Raises:
            RpcError: AlreadyExists; FailedPrecondition once the container has ended.
            SpecError: the process can't be executed.
        """
        # The agent takes the container's own id for its init.
        if request.exec_id in self.execs or request.exec_id == self.id:
            raise RpcError(
                Code.ALREADY_EXISTS, f"exec {request.exec_id!r} of {self.id!r} exists already"
            )
        self.init.require("exec in", State.CREATED, State.RUNNING)
        if not request.spec.type_url.endswith(_PROCESS_TYPE):
            raise SpecError(f"spec of an exec: type {request.spec.type_url!r} is not a Process")
        process = Process(
            container_id=self.id,
            exec_id=request.exec_id,
            namespace=self._sandbox.settings.namespace,
            terminal=request.terminal,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            host_mounts=self._sandbox.settings.host_mounts,
        )
        spec = process_from_json(request.spec.value).message
        spec.Terminal = request.terminal
        self.execs[request.exec_id] = process
        self._exec_requests[request.exec_id] = agent_pb2.ExecProcessRequest(
            container_id=self.id, exec_id=request.exec_id, process=spec
        )
        self._sandbox.events.publish(
            task_events_pb2.TaskExecAdded(container_id=self.id, exec_id=request.exec_id)
        )

    async def start_exec(self, process: Process) -> None:
        """Run an exec that `add_exec` noted.  One that can't be started has ended with 255."""
        async with process.lock:
            process.require("start", State.CREATED)
            self.init.require("exec in", State.RUNNING)
            if self.paused:
                raise RpcError(Code.FAILED_PRECONDITION, f"container {self.id!r} is paused")
            guest = await self._guest()
            try:
                # A caller that gave up leaves no process behind of which nobody knows.
                with trio.CancelScope(shield=True):
                    await self._exec_in_guest(guest, process)
            except BaseException:
                process.set_exited(LOST_STATUS)
                raise

    async def _exec_in_guest(self, guest: Guest, process: Process) -> None:
        request = self._exec_requests[process.exec_id]
        streams: ProcessStreams | None = None
        try:
            streams = await process.open_streams(guest, self._sandbox.nursery)
            streams.put_ports(request)
            if process.size is not None:
                request.process.ConsoleSize.Height, request.process.ConsoleSize.Width = process.size
            await guest.call("ExecProcess", request)
            process.started()
        except BaseException:
            if streams is not None:
                await streams.aclose()
            await process.close_stdio()
            raise
        process.stdio.start(streams.stdin, streams.stdout, streams.stderr)
        self._sandbox.events.publish(
            task_events_pb2.TaskExecStarted(
                container_id=self.id, exec_id=process.exec_id, pid=self._sandbox.pid
            )
        )
        self._sandbox.start_soon(self._watch_exec, guest, process)

    async def _watch_exec(self, guest: Guest, process: Process) -> None:
        self._exited(process, await process.wait_in_guest(guest))

    async def delete_exec(self, process: Process) -> None:
        """Forget an exec that does not run."""
        async with process.lock:  # a Start under way comes first
            self.process(process.exec_id)  # another Delete may have been faster
            process.require("delete", State.CREATED, State.STOPPED)
            self._end(process, LOST_STATUS)  # so that nobody waits any longer
            with trio.CancelScope(shield=True):
                await process.close_stdio()
            self.execs.pop(process.exec_id, None)
            self._exec_requests.pop(process.exec_id, None)

    # --- the end ------------------------------------------------------------------------

    async def delete(self) -> None:
        """Remove the container from the guest and its mounts from the host."""
        async with self.lock:
            if self._deleted:
                raise RpcError(Code.NOT_FOUND, f"{self.init.describe()} does not exist")
            self.init.require("delete", State.CREATED, State.STOPPED)
            if self.init.state is State.CREATED:
                await self._kill_created()
            await self._remove_from_guest()
            # What is only let go of on the host is not left half done by a caller's deadline.
            with trio.CancelScope(shield=True):
                await self._end_execs()
                await self.release()
            await self._run_hooks(HookKind.POSTSTOP)
            self._deleted = True

    async def _kill_created(self) -> None:
        if self._in_guest:
            with contextlib.suppress(RpcError, VmmError):
                await self._kill_for_sure(
                    await self._guest(),
                    agent_pb2.SignalProcessRequest(container_id=self.id, signal=_SIGKILL),
                )
        self._exited(self.init, _KILLED_STATUS)

    async def _end_execs(self) -> None:
        """Nothing of the container is in the guest any more: each exec has its exit event."""
        with trio.move_on_after(_EXEC_WAIT):
            for process in list(self.execs.values()):
                if process.state is State.RUNNING:
                    await process.exited.wait()
        for process in list(self.execs.values()):
            self._end(process, _KILLED_STATUS)
            await process.close_stdio()

    async def _remove_from_guest(self) -> None:
        # The VM of the last container is on its way out, and its guest with it.
        if self._life is None or not self._life.is_running:
            return
        if self._in_guest:
            with contextlib.suppress(RpcError, VmmError):
                guest = await self._guest()
                await guest.call(
                    "RemoveContainer", agent_pb2.RemoveContainerRequest(container_id=self.id)
                )
            self._in_guest = False
        if self._life.sizing is not None:
            self._life.sizing.forget(self.id)
            with contextlib.suppress(VmmError):  # it goes on larger than it need be
                await self._life.sizing.shrink()

    async def release(self) -> None:
        """Let go of what the host holds for it: streams, shared directories, mounts."""
        await self.init.close_stdio()
        if self.files is not None:
            if self._life is not None and self._life.is_running:
                await self.files.unplug()
            self.files.release()
            self.files = None

    # --- while it runs ------------------------------------------------------------------

    async def kill(self, process: Process, signal: int, *, everyone: bool) -> None:
        """Send a signal; to init also for "all", which SIGKILL reaches by the cgroup.

        Raises:
            RpcError: NotFound for a process that has ended, InvalidArgument for a bad signal.
        """
        self._check_signal(process, signal)
        if process.exec_id and process.state is State.CREATED:
            raise RpcError(Code.FAILED_PRECONDITION, f"{process.describe()} is not started")
        guest = await self._guest()
        # Empty means init, and for SIGKILL everyone in the container's cgroup.
        target = process.exec_id or ("" if everyone or signal == _SIGKILL else self.id)
        request = agent_pb2.SignalProcessRequest(
            container_id=self.id, exec_id=target, signal=signal
        )
        try:
            if signal == _SIGKILL:
                await self._kill_for_sure(guest, request)
            else:
                await guest.call("SignalProcess", request)
        except RpcError as error:
            if error.code != Code.UNAVAILABLE:
                raise
            # The guest is lost, so the process is as well, in a moment.
            with trio.move_on_after(_LOSS_LIMIT):
                await process.exited.wait()
            self._check_signal(process, signal)
            raise

    async def _kill_for_sure(self, guest: Guest, request: agent_pb2.SignalProcessRequest) -> None:
        """SIGKILL; a guest that neither takes it nor is healthy is lost, and so ends at once."""
        try:
            await guest.call("SignalProcess", request, limit=_SIGKILL_LIMIT)
        except RpcError as error:
            if error.code != Code.DEADLINE_EXCEEDED:
                raise
            if await guest.is_healthy(_HEALTH_LIMIT):
                await guest.call("SignalProcess", request)  # slow, but it lives
            else:
                guest.declare_lost("it neither took a SIGKILL nor answered a health check")

    @staticmethod
    def _check_signal(process: Process, signal: int) -> None:
        if not 0 <= signal <= _SIGNAL_LIMIT:
            raise RpcError(Code.INVALID_ARGUMENT, f"signal {signal} does not exist")
        if process.state is State.STOPPED:
            raise RpcError(Code.NOT_FOUND, f"{process.describe()}: process already finished")

    async def pause(self) -> None:
        """Freeze the container's processes."""
        async with self.lock:
            self._require_running("pause", paused=False)
            guest = await self._guest()
            await guest.call(
                "PauseContainer", agent_pb2.PauseContainerRequest(container_id=self.id)
            )
            self.paused = True
            self._sandbox.events.publish(task_events_pb2.TaskPaused(container_id=self.id))

    async def resume(self) -> None:
        """Let them go on."""
        async with self.lock:
            self._require_running("resume", paused=True)
            guest = await self._guest()
            await guest.call(
                "ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=self.id)
            )
            self.paused = False
            self._sandbox.events.publish(task_events_pb2.TaskResumed(container_id=self.id))

    def _require_running(self, action: str, *, paused: bool) -> None:
        self.init.require(action, State.RUNNING)
        if self.paused is not paused:
            now = "paused" if self.paused else "running"
            raise RpcError(
                Code.FAILED_PRECONDITION, f"cannot {action} container {self.id!r}: it is {now}"
            )

    async def resize_pty(self, process: Process, *, rows: int, columns: int) -> None:
        """Set the terminal's size; before the start it is kept until then."""
        if process.state is State.STOPPED:
            raise RpcError(Code.FAILED_PRECONDITION, f"{process.describe()} has ended")
        if not process.terminal:
            return
        process.size = (rows, columns)
        if process.state is State.RUNNING:
            await self._resize(await self._guest(), process, process.size)

    async def _resize_first(self, guest: Guest, process: Process) -> None:
        if process.size is None:
            return
        try:
            await self._resize(guest, process, process.size)
        except RpcError as error:  # it runs, whatever its size
            log.warning("%s: size of the terminal: %s", process.describe(), error.message)

    async def _resize(self, guest: Guest, process: Process, size: tuple[int, int]) -> None:
        if not process.terminal:
            return
        await guest.call(
            "TtyWinResize",
            agent_pb2.TtyWinResizeRequest(
                container_id=self.id,
                exec_id=process.exec_id or self.id,
                row=size[0],
                column=size[1],
            ),
        )

    async def update(self, resources: Any) -> None:
        """Apply LinuxResources in the guest.

        Raises:
            SpecError: another type, or values that can't be.
        """
        if not resources.type_url.endswith(_RESOURCES_TYPE):
            raise SpecError(f"resources: type {resources.type_url!r} is not LinuxResources")
        self.init.require("update", State.CREATED, State.RUNNING)
        guest = await self._guest()
        wanted = resources_from_json(resources.value).message
        sizing = self._life.sizing if self._life is not None else None
        if sizing is not None:
            await sizing.update(self.id, wanted)
        guest_resources(wanted)
        await guest.call(
            "UpdateContainer",
            agent_pb2.UpdateContainerRequest(container_id=self.id, resources=wanted),
        )
        if sizing is not None:
            await sizing.shrink()

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """What the guest counts for this container."""
        if self.init.state is State.STOPPED:
            raise RpcError(Code.NOT_FOUND, f"{self.init.describe()} has ended: no statistics")
        guest = await self._guest()
        reply: agent_pb2.StatsContainerResponse = await guest.call(
            "StatsContainer", agent_pb2.StatsContainerRequest(container_id=self.id)
        )
        return reply

    # --- what it is ---------------------------------------------------------------------

    def process(self, exec_id: str) -> Process:
        """The init process, or the exec with that id.

        Raises:
            RpcError: NotFound.
        """
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise RpcError(
                Code.NOT_FOUND, f"exec {exec_id!r} of container {self.id!r} does not exist"
            ) from None

    def processes(self) -> list[Process]:
        """Init first, then the execs."""
        return [self.init, *self.execs.values()]

    def status_of(self, process: Process) -> Any:
        """containerd's Status of a process; a paused container's running ones are PAUSED."""
        if self.paused and process.state is State.RUNNING:
            return task_types_pb2.PAUSED
        return process.state.value

    async def _guest(self) -> Guest:
        if self._life is None:
            raise RpcError(Code.FAILED_PRECONDITION, f"container {self.id!r} is being created")
        return await self._life.guest()

    async def _run_hooks(self, *kinds: HookKind) -> None:
        if not any(self.spec.hooks[kind] for kind in kinds):
            return
        state = ContainerState(
            id=self.id,
            pid=self._sandbox.pid,
            bundle=Path(self.bundle),
            annotations=self.spec.annotations,
            netns=self._life.netns if self._life else "",
        )
        for kind in kinds:
            await run_hooks(
                kind,
                self.spec.hooks[kind],
                state,
                mount_namespace=self._sandbox.settings.host_mounts,
            )


def _complete(spec: oci_pb2.Spec, origin: Origin) -> None:
    """Add what belongs to the pod and the engine did not repeat for its container."""
    for name, value in origin.sysctls:
        if name not in spec.Linux.Sysctl:
            spec.Linux.Sysctl[name] = value
    # The Sandbox API's sandboxes have no files on the host that could be mounted.
    if origin.dns and all(mount.destination != _RESOLV_CONF for mount in spec.Mounts):
        spec.Mounts.add(
            destination=_RESOLV_CONF, type="bind", source=_RESOLV_CONF, options=["rbind", "ro"]
        )
