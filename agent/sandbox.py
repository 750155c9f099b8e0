# SPDX-License-Identifier: Apache-2.0
"""The pod inside the VM: its containers, and what they share.

The uts, ipc and network namespaces of the pod are the VM's own: nothing else is in it.
"""

from __future__ import annotations

import os
from collections import deque

from agent import init, log, spec
from agent.container import Container
from agent.loop import Future, Loop
from agent.process import Ports, Process
from agent.reaper import Reaper
from agent.stdio import Streams
from agent.storage import SHARE, Storages
from agent.submounts import Submounts
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from agent.api import agent_pb2, oci_pb2
    from agent.cmdline import AgentConfig

_WORK = "/run/agent"
_ID_LIMIT = 128
_CONTAINER_LIMIT = 1024
_OOM_QUEUE = 64
_KIND, _PAUSE = "io.katacontainers.pkg.oci.container_type", "pod_sandbox"
_ID_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class Sandbox:
    """There is one in a guest."""

    def __init__(self, loop: Loop, reaper: Reaper, streams: Streams, config: AgentConfig) -> None:
        self.loop = loop
        self.reaper = reaper
        self.streams = streams
        self.config = config
        self.storages = Storages(config.hotplug_timeout)
        self.submounts = Submounts(SHARE)
        self.containers: dict[str, Container] = {}
        self._pid_namespace_of: Container | None = None
        self._makes_pid_namespace = False
        self._pid_holder = 0
        self._oom_events: deque[str] = deque(maxlen=_OOM_QUEUE)
        self._oom_readers: deque[Future] = deque()
        self._paths = 0
        self._hooks = ""
        os.makedirs(_WORK, mode=0o700, exist_ok=True)

    def create(self, request: agent_pb2.CreateSandboxRequest) -> Generator[Any, Any, None]:
        """Host name, DNS and the storages of the pod."""
        self._hooks = request.guest_hook_path
        self._makes_pid_namespace = request.sandbox_pidns
        if request.hostname:
            init.set_hostname(request.hostname)
        for module in request.kernel_modules:
            yield from _load_module(module.name, list(module.parameters))
        yield from self.storages.attach_all(request.storages)
        init.set_dns(list(request.dns))

    def new_identity(self) -> None:
        """The guest goes on as another machine."""
        if os.getpid() == 1:
            init.new_machine_id()

    def destroy(self) -> Generator[Any, Any, None]:
        """Remove all containers and storages."""
        for container in list(self.containers.values()):
            yield from self.remove(container.id)
        yield from self.storages.flush()
        for failure in self.storages.detach_all():
            log.warning("storage stays", error=failure)

    def create_container(
        self, request: agent_pb2.CreateContainerRequest
    ) -> Generator[Any, Any, None]:
        """Attach what it needs and create it; on an error nothing of it stays."""
        container_id = check_id(request.container_id)
        if container_id in self.containers:
            raise RpcError(Code.ALREADY_EXISTS, f"container {container_id!r} exists already")
        if len(self.containers) >= _CONTAINER_LIMIT:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED, f"this sandbox has {_CONTAINER_LIMIT} containers"
            )
        oci = request.OCI
        process = new_process(self.loop, request.exec_id or container_id, oci.Process)
        cgroup = spec.cgroup_path(oci.Linux.CgroupsPath) or f"/{container_id}"
        oci.Linux.CgroupsPath = cgroup
        container = Container(self, container_id, process, cgroup)
        container.termination_log = _termination_log(oci)
        self.containers[container_id] = container
        try:
            sources = [mount.source for mount in oci.Mounts]
            sources += [storage.source for storage in request.storages]
            container.submounts = self.submounts.hold(sources)
            container.storages = yield from self.storages.attach_all(request.storages, container_id)
            if request.devices:
                from agent import devices

                yield from devices.attach_devices(request.devices, oci, self.config.hotplug_timeout)
            _set_sysctls(spec.shared_sysctls(oci))
            document = spec.runtime_spec(oci, self._pid_namespace(request.sandbox_pidns))
            if self._hooks:
                spec.add_hooks(document, self._hooks)
            ports = Ports(request.stdin_port, request.stdout_port, request.stderr_port)
            yield from process.prepare(self.streams, ports, self.config.container_pipe_size)
            yield from container.create(document)
        except BaseException:
            del self.containers[container_id]
            container.clean_up()
            raise
        if self._pid_namespace_of is None and (
            not self._makes_pid_namespace or oci.Annotations.get(_KIND) == _PAUSE
        ):
            self._pid_namespace_of = container

    def execute(self, request: agent_pb2.ExecProcessRequest) -> Generator[Any, Any, None]:
        """One more process in a container."""
        container = self.find(request.container_id)
        if not request.exec_id or len(request.exec_id) > _ID_LIMIT:
            raise RpcError(Code.INVALID_ARGUMENT, f"exec_id {request.exec_id[:40]!r} can't be")
        process = new_process(self.loop, request.exec_id, request.process)
        ports = Ports(request.stdin_port, request.stdout_port, request.stderr_port)
        yield from process.prepare(self.streams, ports, self.config.container_pipe_size)
        try:
            yield from container.execute(process, request.process)
        except BaseException:
            process.abandon()
            raise

    def remove(self, container_id: str) -> Generator[Any, Any, None]:
        """Remove a container, whatever its state."""
        container = self.find(container_id)
        yield from container.remove()
        self.containers.pop(container_id, None)
        if self._pid_namespace_of is container:
            self._pid_namespace_of = None

    def find(self, container_id: str) -> Container:
        """Raises NOT_FOUND."""
        container = self.containers.get(container_id)
        if container is None:
            raise RpcError(Code.NOT_FOUND, f"container {container_id!r} does not exist")
        return container

    def next_oom(self) -> Future:
        """The id of the next container in which the kernel killed for memory."""
        future = Future()
        if self._oom_events:
            future.set(self._oom_events.popleft())
        else:
            self._oom_readers.append(future)
        return future

    def forget_oom_reader(self, future: Future) -> None:
        """Who called `next_oom` is gone; the event is for another."""
        if future in self._oom_readers:
            self._oom_readers.remove(future)

    def new_path(self, end: str) -> str:
        """A path for a file that lives as long as one call.  Short: some are sockets."""
        self._paths += 1
        return f"{_WORK}/{self._paths}.{end}"

    def oom_happened(self, container_id: str) -> None:
        """Tell who waits for it, or keep it."""
        log.info("killed for memory", container=container_id)
        if self._oom_readers:
            self._oom_readers.popleft().set(container_id)
        else:
            self._oom_events.append(container_id)

    def _pid_namespace(self, shared: bool) -> str | None:
        if not shared:
            return None
        owner = self._pid_namespace_of
        if self._makes_pid_namespace and owner is None:
            if not self._pid_holder:
                from agent.pid_namespace import hold_pid_namespace

                self._pid_holder = hold_pid_namespace()
            return f"/proc/{self._pid_holder}/ns/pid"
        if owner is None or owner.init.ended:
            raise RpcError(
                Code.FAILED_PRECONDITION, "no container is there whose pid namespace is shared"
            )
        return f"/proc/{owner.init.pid}/ns/pid"


def new_process(loop: Loop, exec_id: str, oci: oci_pb2.Process) -> Process:
    """The agent's view of an OCI process."""
    return Process(loop, exec_id, terminal=oci.Terminal, user=(oci.User.UID, oci.User.GID))


def check_id(container_id: str) -> str:
    """Kata's rule: an alphanumeric first, then also . - _, more than one character.

    Raises:
        RpcError: INVALID_ARGUMENT.
    """
    good = (
        1 < len(container_id) <= _ID_LIMIT
        and container_id[0].isalnum()
        and _ID_CHARS.issuperset(container_id)
    )
    if not good:
        raise RpcError(Code.INVALID_ARGUMENT, f"container id {container_id[:40]!r} is invalid")
    return container_id


def _termination_log(oci: oci_pb2.Spec) -> str:
    from agent.diagnostics import ANNOTATION, DEFAULT_PATH

    inside = oci.Annotations.get(ANNOTATION, DEFAULT_PATH)
    for mount in oci.Mounts:
        if mount.destination == inside:
            return mount.source
    return f"{oci.Root.Path}/{inside.lstrip('/')}"


def _set_sysctls(values: dict[str, str]) -> None:
    for name, value in values.items():
        path = "/proc/sys/" + name.replace(".", "/")
        if ".." in path:
            raise RpcError(Code.INVALID_ARGUMENT, f"sysctl {name!r} is no name")
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(value)
        except OSError as error:
            raise RpcError(
                Code.INVALID_ARGUMENT, f"sysctl {name} = {value!r}: {error.strerror}"
            ) from error


def _load_module(name: str, parameters: list[str]) -> Generator[Any, Any, None]:
    from agent.waiting import Command

    done = yield Command(["/sbin/modprobe", "--", name, *parameters])
    if done.status:
        text = done.stderr.decode(errors="replace").strip()
        raise RpcError(Code.INTERNAL, f"kernel module {name!r}: {text}")
