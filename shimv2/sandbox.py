# SPDX-License-Identifier: Apache-2.0
"""The sandbox: one VM, the containers in it, and when either begins and ends.

Everything that containerd asks ends here.  Nothing in this file speaks a protocol.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

from shimv2 import pod_config, volumes
from shimv2 import spec as oci
from shimv2.api import task_events_pb2
from shimv2.bootstrap import config_path_of
from shimv2.config import apply_annotations, load_config
from shimv2.container import Container
from shimv2.events import EventPublisher
from shimv2.guest import Guest
from shimv2.life import Life, Origin
from shimv2.log import about
from shimv2.metrics.durations import Durations
from shimv2.network.traces import Trace
from shimv2.pause import PauseContainer
from shimv2.process import LOST_STATUS, Process
from shimv2.share import Share
from shimv2.sizing import workload
from shimv2.state import SandboxRecord, share_dir, start_time, vm_dir
from shimv2.stats import Metrics, host_is_unified, to_containerd
from shimv2.timeline import Timeline
from shimv2.timestamps import timestamp
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmError

log = logging.getLogger("sandbox")

_SHUTDOWN_LIMIT = 2.5  # seconds; containerd gives an answer to Shutdown three
_OOM_PAUSE = 0.1  # seconds between two OOM events, so that a guest can't flood containerd


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """What `start` knew.

    Attributes:
        options: serialized Any with the runtime options, b"" for none.
        host_mounts: descriptor of the host's mount namespace, for hooks and loggers.
    """

    namespace: str
    sandbox_id: str
    bundle: str
    containerd: str
    socket: str
    options: bytes
    host_mounts: int


class Sandbox:
    """See the module's docstring.  An async context manager that owns every task below it.

    Attributes:
        created_at, exited_at: nanoseconds since the epoch, 0 if not yet.
        exit_status: of the sandbox as a whole: 0, or 255 if its guest was lost.
        calls: how long those of the Task API took.
    """

    def __init__(self, settings: SandboxSettings, events: EventPublisher, timeline: Timeline):
        self.settings = settings
        self.id = settings.sandbox_id
        self.events = events
        self.timeline = timeline
        self.containers: dict[str, Container] = {}
        self.share = Share(share_dir(self.id))
        self.created_at = 0
        self.exited_at = 0
        self.exit_status = 0
        self.calls = Durations()
        self.pid = 0
        self.nursery: trio.Nursery
        self._nursery_manager: Any = None
        self._record = SandboxRecord.load(self.id) or SandboxRecord(
            self.id, settings.namespace, settings.containerd, settings.socket
        )
        self._life: Life | None = None
        self._launch_error: Exception | None = None
        self._launching = trio.Lock()
        self._creating: set[str] = set()  # ids; nobody but Create knows these containers yet
        self._claimed = False  # somebody relies on the VM, so it is no early one any more
        self._start_kept = False
        self._by_api = False  # made by CreateSandbox, ended by ShutdownSandbox alone
        self._shutdown = trio.Event()
        self._ended = trio.Event()

    async def __aenter__(self) -> Self:
        self._nursery_manager = trio.open_nursery()
        self.nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, trio.Cancelled):
            log.critical("the sandbox ends by an error of the shim's own", exc_info=error)
        self.nursery.cancel_scope.cancel()
        await self._nursery_manager.__aexit__(kind, error, trace)
        self.share.close()

    # --- the VM -------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """The guest is up and was not lost or stopped."""
        return self._life is not None and self._life.is_running

    def start_early(self) -> None:
        """Launch the VM now if all that it depends on is known (DESIGN decision 2).

        What fails here is reported by Create, which has a way to answer.
        """
        if not Path(self.settings.bundle, "config.json").exists():
            return
        try:
            spec = oci.load(Path(self.settings.bundle))
            self._launch(self._origin(spec, self.settings.options))
        except Exception as error:
            log.info("no early start: %s", error)
            self._launch_error = error

    def _origin(self, spec: oci.Spec, options: bytes) -> Origin:
        path, _ = config_path_of(options)
        config = load_config(Path(path) if path else None)
        config = apply_annotations(config, spec.annotations)
        self._record.pod = pod_config.pod_of(spec.annotations)
        if vm_dir(self.id) == Path(config.factory.template_path):  # Kata's place for templates
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"sandbox id {self.id!r}: template_path = {config.factory.template_path!r} in "
                "section [factory] is the directory that this sandbox would have",
            )
        return Origin(
            config=config,
            netns=spec.netns or "",
            hostname=spec.hostname,
            cgroups_path=spec.cgroups_path,
            dns=tuple(volumes.dns_lines(spec)),
            sysctls=tuple(spec.sysctls.items()),
            storages=tuple(
                volumes.sandbox_storages(spec, share=config.hypervisor.shared_fs != "none")
            ),
            workload=workload(config, spec),
        )

    def _launch(self, origin: Origin) -> None:
        if origin.config.runtime.enable_debug:
            logging.getLogger().setLevel(logging.DEBUG)
        for warning in origin.config.warnings:
            log.warning("%s", warning)
        self.share.open()  # not by the VM's own task: containers are shared while it boots
        self._launch_error = None
        self.exited_at = self.exit_status = 0
        self._ended = trio.Event()
        self._claimed = False
        self._life = Life(self, origin)
        with about():  # it outlives the container whose call it begins with
            self.nursery.start_soon(self._life.run)

    async def _ensure_launched(self, spec: oci.Spec, options: bytes) -> Life:
        """The VM for this origin: the early one if it fits, else a new one."""
        async with self._launching:
            self._refuse_at_end()
            if self._life is not None and not self._claimed and options != self.settings.options:
                origin = self._origin(spec, options)
                if origin != self._life.origin:
                    log.info("Create brings other options: the early VM is thrown away")
                    await self._discard_life()
            elif (
                self._life is not None
                and self._life.was_stopped
                and not self.containers
                and not self._by_api
            ):
                await self._discard_life()  # who wanted its end did not wait for it
            if self._life is None:
                self._refuse_at_end()
                self._launch(self._origin(spec, options or self.settings.options))
            assert self._life is not None
            self._claimed = True
            return self._life

    async def _discard_life(self) -> None:
        """End the VM, so that the next to come begins with another.  `_launching` is held."""
        if self._life is not None:
            await self._life.stop()
            self._life = None

    async def _end_unused_life(self) -> None:
        async with self._launching:
            if not self.containers and not self._creating and not self._by_api:
                await self._discard_life()

    def _refuse_at_end(self) -> None:
        if self._shutdown.is_set():
            raise RpcError(Code.FAILED_PRECONDITION, f"sandbox {self.id!r} is shutting down")

    async def guest(self) -> Guest:
        """The booted guest; waits for it.

        Raises:
            VmmError, RpcError: why there is none.
        """
        if self._life is None:
            raise RpcError(Code.FAILED_PRECONDITION, f"sandbox {self.id!r} has no VM yet")
        return await self._life.guest()

    def remember_process(self, name: str, pid: int) -> None:
        """A helper that `delete` must find should this shim be killed."""
        if name in ("vmm", "holder"):  # the holder comes later, where the VMM is elsewhere
            self.pid = pid
        self._record.add_process(name, pid)
        self._record.save()

    @property
    def processes(self) -> dict[str, int]:
        """Pids of the shim and of its helpers that run, by their names in the record."""
        known = self._record.processes.items()
        return {name: pid for name, (pid, started) in known if start_time(pid) == started}

    def remember_cgroups(self, paths: list[str]) -> None:
        """Cgroups to remove at the end, innermost first."""
        self._record.cgroups = paths
        self._record.save()

    def remember_traces(self, netns: str, traces: list[Trace]) -> None:
        """What stands in the pod's network namespace, for `delete` to remove."""
        self._record.netns = netns, os.stat(netns).st_ino if traces else 0
        self._record.traces = [(t.kind, t.link, t.name) for t in traces]
        self._record.save()

    def start_soon(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run a task of the sandbox; what it lets out is logged and ends nothing else."""
        self.nursery.start_soon(self._guarded, work, *args)

    async def _guarded(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            await work(*args)
        except Exception:
            log.exception("a task of the sandbox failed")

    def life_ended(self, life: Life, lost: str) -> None:
        """The VM is gone: so is everything that ran in it.

        Args:
            lost: why, where nobody had asked for it.
        """
        if life is not self._life:
            return
        if lost:
            log.error("sandbox lost: %s", lost)
            self.exit_status = LOST_STATUS
        for container in self.containers.values():
            container.guest_lost()
        self.exited_at = time.time_ns()
        self._ended.set()

    # --- the Sandbox API ----------------------------------------------------------------

    async def create_sandbox(self, request: Any) -> None:
        """CreateSandbox: the netns path comes only with this call."""
        async with self._launching:
            self._refuse_at_end()
            if self._by_api or self._claimed:
                raise RpcError(Code.ALREADY_EXISTS, f"sandbox {self.id!r} already exists")
            bundle = Path(request.bundle_path or self.settings.bundle)
            origin = self._origin(pod_config.sandbox_spec(bundle, request), self.settings.options)
            origin = replace(origin, dns=tuple(pod_config.resolver_lines(request)))
            if self._life is None or self._life.origin != origin:
                await self._discard_life()  # an early one that did not know all of this
                self._refuse_at_end()
                self._launch(origin)
            self._by_api = self._claimed = True

    async def start_sandbox(self) -> None:
        """StartSandbox: returns when the guest is up."""
        if not self._by_api:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"sandbox {self.id!r} is not created (failed precondition)",
            )
        if self._ended.is_set() and not self.exit_status:
            raise RpcError(Code.FAILED_PRECONDITION, f"sandbox {self.id!r} was stopped")
        await self.guest()
        self.created_at = self.created_at or time.time_ns()

    async def facts(self) -> dict[str, str]:
        """Verbose information for SandboxStatus."""
        if not self.is_running:
            return {}
        try:
            return await (await self.guest()).facts()
        except (VmmError, RpcError):  # it has ended meanwhile
            return {}

    async def sandbox_stats(self) -> Metrics:
        """The sum of what the containers use, as the guest counts it."""
        if not self.is_running:
            raise RpcError(Code.FAILED_PRECONDITION, f"sandbox {self.id!r} is not running")
        return to_containerd(
            await (await self.guest()).sandbox_stats(list(self.containers)),
            unified=host_is_unified(),
        )

    async def wait_ended(self) -> None:
        """Until the VM is gone, by whoever.

        Raises:
            RpcError: FailedPrecondition before CreateSandbox.
        """
        if not self._by_api:
            raise RpcError(Code.FAILED_PRECONDITION, f"sandbox {self.id!r} is not created")
        await self._ended.wait()

    async def stop(self) -> None:
        """End the VM and all in it.  Idempotent."""
        if self._life is not None:
            await self._life.stop()

    async def shutdown(self, *, now: bool, container_id: str = "") -> None:
        """End the shim, unless others still live in it.

        Returns once containerd has its events, or nearly as long as it waits for an answer:
        then it closes its connection and runs `delete`, which lets no shim live.

        Args:
            now: end it whatever lives in it.
            container_id: on whose behalf; it may itself still be there.
        """
        others = [name for name in (*self.containers, *self._creating) if name != container_id]
        if not now and (others or (self._by_api and self.is_running)):
            return
        self._shutdown.set()
        with trio.move_on_after(_SHUTDOWN_LIMIT):
            await self.stop()
            await self.events.flush(_SHUTDOWN_LIMIT)

    async def wait_shutdown(self) -> None:
        """Until somebody asked for the end of the shim."""
        await self._shutdown.wait()

    # --- containers ---------------------------------------------------------------------

    def find(self, container_id: str, exec_id: str = "") -> tuple[Container, Process]:
        """A container and one of its processes.

        Raises:
            RpcError: NotFound, naming the one that is missing.
        """
        container = self.containers.get(container_id)
        if container is None:
            raise RpcError(Code.NOT_FOUND, f"container {container_id!r} does not exist")
        return container, container.process(exec_id)

    async def create(self, request: Any) -> None:
        """Create a container; the first one waits for the VM."""
        if request.id in self.containers or request.id in self._creating:
            raise RpcError(Code.ALREADY_EXISTS, f"container {request.id!r} already exists")
        self._creating.add(request.id)
        try:
            await self._create(request)
        except BaseException:
            self._creating.remove(request.id)
            with trio.CancelScope(shield=True):
                await self._end_unused_life()
            raise
        self._creating.remove(request.id)

    async def _create(self, request: Any) -> None:
        if (
            self._launch_error is not None
            and self._life is None
            and not request.HasField("options")
        ):
            error, self._launch_error = self._launch_error, None
            raise error
        try:
            spec = oci.load(Path(request.bundle))
        except FileNotFoundError as error:
            raise oci.SpecError(f"{error.filename}: {error.strerror}") from None
        options = request.options.SerializeToString() if request.HasField("options") else b""
        life = await self._ensure_launched(spec, options)
        process = Process(
            container_id=request.id,
            exec_id="",
            namespace=self.settings.namespace,
            terminal=request.terminal,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            host_mounts=self.settings.host_mounts,
        )
        kind = PauseContainer if spec.kind is oci.ContainerKind.SANDBOX else Container
        container = kind(self, spec, request.bundle, process)
        try:
            await container.create(life, list(request.rootfs))
            life.require_running()  # it may have been lost in the same moment
        except BaseException:
            with trio.CancelScope(shield=True):
                await container.abandon()
            raise
        self.containers[request.id] = container
        self.created_at = self.created_at or time.time_ns()
        event = task_events_pb2.TaskCreate(
            container_id=request.id,
            bundle=request.bundle,
            rootfs=request.rootfs,
            checkpoint=request.checkpoint,
            pid=self.pid,
        )
        event.io.stdin, event.io.stdout, event.io.stderr = (
            request.stdin,
            request.stdout,
            request.stderr,
        )
        event.io.terminal = request.terminal
        self.events.publish(event)
        container.watch()
        self.timeline.mark("container-created")

    async def delete(self, container_id: str, exec_id: str) -> Process:
        """Remove a container or an exec that does not run; returns it for its status."""
        container, process = self.find(container_id, exec_id)
        if exec_id:
            await container.delete_exec(process)
            return process
        await container.delete()
        self.containers.pop(container_id, None)
        try:
            await self._end_unused_life()  # so that no process is left when containerd goes on
        finally:  # it is deleted, whether the caller waited for the VM's end or not
            self._publish_delete(container_id, process)
        return process

    def _publish_delete(self, container_id: str, process: Process) -> None:
        self.events.publish(
            task_events_pb2.TaskDelete(
                container_id=container_id,
                pid=self.pid,
                exit_status=process.exit_status,
                exited_at=timestamp(process.exited_at),
            )
        )

    async def start(self, container_id: str, exec_id: str) -> None:
        """Start init, or an exec that was added."""
        container, process = self.find(container_id, exec_id)
        if exec_id:
            await container.start_exec(process)
        else:
            await container.start()
            self.timeline.mark("container-started")
            log.info("container %s started: %s", container_id, self.timeline)
            if not self._start_kept:
                self._start_kept = True
                self.start_soon(self._keep_start)

    async def _keep_start(self) -> None:
        """For `kata-runtime boot-report`; in a thread, since Start's answer is due."""
        marks = {name: round(seconds, 6) for name, seconds in self.timeline.marks.items()}

        def keep() -> None:
            from shimv2.boot import history  # no start has to wait for this import

            timeline, namespace = self.timeline, self.settings.namespace
            record = history.BootRecord(
                self.id, namespace, timeline.kind, timeline.began, marks, timeline.accelerator
            )
            history.save(record, history.HISTORY)

        try:
            with trio.CancelScope(shield=True):  # of a container that ends at once, too
                await trio.to_thread.run_sync(keep)
        except (OSError, ValueError) as error:
            log.warning("this start is not kept for boot-report: %s", error)

    def init_exited(self, container: Container) -> None:
        """The sandbox's own container ends the VM, without waiting for its Delete."""
        if container.id == self.id and not self._by_api and self._life is not None:
            self.start_soon(self._life.stop)

    async def stats(self, container_id: str) -> Metrics:
        """A container's statistics in the host's cgroup version."""
        container, _ = self.find(container_id)
        return to_containerd(await container.stats(), unified=host_is_unified())

    async def watch_oom(self, guest: Guest) -> None:
        """Publish TaskOOM for each container the guest's kernel killed in."""
        with contextlib.suppress(RpcError):
            while True:
                container_id = await guest.next_oom()
                if container_id in self.containers:
                    self.events.publish(task_events_pb2.TaskOOM(container_id=container_id))
                await trio.sleep(_OOM_PAUSE)
