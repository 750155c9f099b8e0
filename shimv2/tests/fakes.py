# SPDX-License-Identifier: Apache-2.0
"""A sandbox without a VM: what containerd asks is decided by the shim's own code alone."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from shimv2 import sandbox as sandbox_module
from shimv2.api import task_events_pb2, task_v3_pb2
from shimv2.config import load_config
from shimv2.life import Origin
from shimv2.sandbox import Sandbox, SandboxSettings
from shimv2.spec import Spec
from shimv2.streams import ProcessStreams
from shimv2.task_service import TaskService
from shimv2.timeline import Timeline
from ttrpc.errors import Code, RpcError

Behaviour = Callable[[Any], Awaitable[None]]


class FakeGuest:
    """Answers every call at once, unless `on` says otherwise.

    Attributes:
        calls: methods in the order of the calls.
        ended: statuses by (container, exec); set by `end`.
        on: by method, what is awaited before the answer; it may raise.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on: dict[str, Behaviour] = {}
        self.lost = trio.Event()
        self.reason = ""
        self._status: dict[tuple[str, str], int] = {}
        self._changed: defaultdict[tuple[str, str], trio.Event] = defaultdict(trio.Event)

    async def call(self, method: str, request: Message, limit: float = 30.0) -> Any:
        self.calls.append(method)
        error: RpcError | None = None
        with trio.move_on_after(limit) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_lost, nursery.cancel_scope)
                try:
                    await trio.lowlevel.checkpoint()
                    if method in self.on:
                        await self.on[method](request)
                except RpcError as refused:
                    error = refused
                nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        if scope.cancelled_caught:
            raise RpcError(Code.DEADLINE_EXCEEDED, f"{method} took too long")
        if self.lost.is_set():
            raise RpcError(Code.UNAVAILABLE, f"the guest is lost: {self.reason}")

    async def _until_lost(self, scope: trio.CancelScope) -> None:
        await self.lost.wait()
        scope.cancel()

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        key = container_id, exec_id
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_lost, nursery.cancel_scope)
            await self._changed[key].wait()
            nursery.cancel_scope.cancel()
        if key not in self._status:
            raise RpcError(Code.UNAVAILABLE, "the guest is lost")
        return self._status[key]

    def end(self, container_id: str, exec_id: str = "", status: int = 0) -> None:
        self._status[container_id, exec_id] = status
        self._changed[container_id, exec_id].set()

    async def open_streams(self, *_: Any, **__: Any) -> ProcessStreams:
        await trio.lowlevel.checkpoint()
        return ProcessStreams()

    async def is_healthy(self, limit: float) -> bool:
        try:
            await self.call("Check", empty_pb2.Empty(), limit)
        except RpcError:
            return False
        return True

    def declare_lost(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.lost.set()


class FakeLife:
    """A VM that is up at once, or fails with `failures.pop(0)`."""

    failures: list[Exception]
    lives: list[FakeLife]

    def __init__(self, sandbox: Sandbox, origin: Origin) -> None:
        self.sandbox = sandbox
        self.origin = origin
        self.netns = ""
        self.sizing = None  # it keeps its size
        self.drives = None
        self.booted = FakeGuest()
        self._failure = self.failures.pop(0) if self.failures else None
        self._stop = trio.Event()
        self._ended = trio.Event()
        self.lives.append(self)

    @property
    def is_running(self) -> bool:
        return self._failure is None and not self._ended.is_set() and not self._stop.is_set()

    @property
    def was_stopped(self) -> bool:
        return self._stop.is_set()

    def require_running(self) -> None:
        if not self.is_running:
            raise RpcError(Code.UNAVAILABLE, "the VM has ended")

    async def guest(self) -> FakeGuest:
        await trio.lowlevel.checkpoint()
        if self._failure is not None:
            await self._ended.wait()
            raise self._failure
        if self._ended.is_set():
            raise RpcError(Code.UNAVAILABLE, "the VM has ended")
        return self.booted

    async def update_network(self) -> None:
        await trio.lowlevel.checkpoint()

    async def stop(self) -> None:
        self._stop.set()
        self.booted.declare_lost("stopped")
        await self._ended.wait()

    async def run(self) -> None:
        try:
            if self._failure is None:
                await self.booted.lost.wait()
        finally:
            self._ended.set()
            self.sandbox.life_ended(self, "" if self._stop.is_set() else "the VMM has ended")  # type: ignore[arg-type]


class FakeShare:
    """Attributes: opened: it can be used."""

    def __init__(self) -> None:
        self.opened = False

    def open(self) -> None:
        self.opened = True

    def close(self) -> None:
        """Nothing is held."""

    def add_rootfs(self, container_id: str, rootfs: Path) -> Path:
        assert self.opened, "a container is shared before there is a share"
        return Path("/run/guest", container_id)

    def remove_container(self, container_id: str) -> None:
        """Nothing is held."""


class Events:
    """What would go to containerd.

    Attributes:
        flushed: how many of them somebody waited for.
    """

    def __init__(self) -> None:
        self.published: list[Message] = []
        self.flushed = 0

    def publish(self, event: Message) -> None:
        self.published.append(event)

    async def flush(self, limit: float) -> bool:
        self.flushed = len(self.published)
        return True

    def names(self) -> list[str]:
        """As "TaskExit web 255"."""
        found = []
        for event in self.published:
            assert isinstance(event, Message)
            name = f"{type(event).__name__} {getattr(event, 'container_id', '')}"
            if isinstance(event, task_events_pb2.TaskExit):
                name = f"TaskExit {event.id} {event.exit_status}"
            elif hasattr(event, "exec_id"):
                name += f" {event.exec_id}"
            found.append(name)
        return found


class Shim:
    """A sandbox, its Task service and short ways to ask it."""

    def __init__(self, sandbox: Sandbox, events: Events, root: Path) -> None:
        self.sandbox = sandbox
        self.events = events
        self.root = root
        self.service = TaskService(sandbox, task_v3_pb2)

    @property
    def guest(self) -> FakeGuest:
        return FakeLife.lives[-1].booted

    def bundle(self, container_id: str) -> Path:
        bundle = self.root / container_id
        (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
        spec = {
            "ociVersion": "1.1.0",
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "linux": {},
        }
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    async def create(self, container_id: str = "web", **more: Any) -> None:
        bundle = more.pop("bundle", None) or self.bundle(container_id)
        await self.ask("Create", "CreateTaskRequest", id=container_id, bundle=str(bundle), **more)

    async def ask(self, method: str, kind: str = "", /, **fields: Any) -> Any:
        request = getattr(task_v3_pb2, kind or f"{method}Request")(**fields)
        return await getattr(self.service, method)(request, None)

    async def add_exec(self, exec_id: str, container_id: str = "web") -> None:
        request = task_v3_pb2.ExecProcessRequest(id=container_id, exec_id=exec_id)
        request.spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process"
        request.spec.value = json.dumps({"args": ["true"], "cwd": "/"}).encode()
        await self.service.Exec(request, None)  # type: ignore[arg-type]

    async def code(self, method: str, kind: str = "", /, **fields: Any) -> Code:
        """The status of a request."""
        try:
            await self.ask(method, kind, **fields)
        except RpcError as error:
            return error.code
        return Code.OK


@contextlib.asynccontextmanager
async def shim_of(root: Path, monkeypatch: Any) -> AsyncIterator[Shim]:
    """A shim whose VM is a `FakeLife`."""
    FakeLife.lives, FakeLife.failures = [], []
    config_file = root / "configuration.toml"
    config_file.write_text("[hypervisor.qemu]\n")
    config = load_config(config_file)

    def origin(_sandbox: Sandbox, _spec: Spec, options: bytes) -> Origin:
        if options == b"bad":
            raise RpcError(Code.INVALID_ARGUMENT, "bad options")
        return Origin(config, "", options.hex(), "", (), (), ())

    monkeypatch.setattr(sandbox_module, "Life", FakeLife)
    monkeypatch.setattr(Sandbox, "_origin", origin)
    events = Events()
    settings = SandboxSettings("test", "pod", str(root), "", "", b"", -1)
    async with Sandbox(settings, events, Timeline()) as sandbox:  # type: ignore[arg-type]
        sandbox.share = FakeShare()  # type: ignore[assignment]
        yield Shim(sandbox, events, root)
