# SPDX-License-Identifier: Apache-2.0
"""containerd's Sandbox API: a pod without a pause container.  `Sandbox` decides."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

import trio

from shimv2.api import sandbox_pb2 as api
from shimv2.errors import as_rpc_error
from shimv2.timestamps import put
from ttrpc.errors import Code, RpcError

if TYPE_CHECKING:
    from shimv2.sandbox import Sandbox
    from ttrpc.server import Context

READY = "SANDBOX_READY"
NOT_READY = "SANDBOX_NOTREADY"

_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class SandboxService:
    """Serves containerd.runtime.sandbox.v1.Sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def CreateSandbox(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        with as_rpc_error():
            await self._sandbox.create_sandbox(request)
        return api.CreateSandboxResponse()

    async def StartSandbox(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        with as_rpc_error():
            await self._sandbox.start_sandbox()
        answer = api.StartSandboxResponse(pid=self._sandbox.pid)
        put(answer.created_at, self._sandbox.created_at)
        return answer

    async def Platform(self, request: Any, context: Context) -> Any:
        answer = api.PlatformResponse()
        answer.platform.os = "linux"
        machine = platform.machine()
        answer.platform.architecture = _GO_ARCHITECTURES.get(machine, machine)
        return answer

    async def StopSandbox(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        limit = request.timeout_secs or float("inf")
        with trio.move_on_after(limit) as scope:
            await self._sandbox.stop()
        if scope.cancelled_caught:
            raise RpcError(
                Code.DEADLINE_EXCEEDED, f"the sandbox did not stop in {request.timeout_secs} s"
            )
        return api.StopSandboxResponse()

    async def WaitSandbox(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        await self._sandbox.wait_ended()
        answer = api.WaitSandboxResponse(exit_status=self._sandbox.exit_status)
        put(answer.exited_at, self._sandbox.exited_at)
        return answer

    async def SandboxStatus(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        sandbox = self._sandbox
        answer = api.SandboxStatusResponse(
            sandbox_id=sandbox.id,
            pid=sandbox.pid,
            state=READY if sandbox.is_running else NOT_READY,
        )
        if sandbox.created_at:
            put(answer.created_at, sandbox.created_at)
        if sandbox.exited_at:
            put(answer.exited_at, sandbox.exited_at)
        if request.verbose:
            answer.info.update(await sandbox.facts())
        return answer

    async def PingSandbox(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        return api.PingResponse()

    async def ShutdownSandbox(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        await self._sandbox.shutdown(now=True)
        return api.ShutdownSandboxResponse()

    async def SandboxMetrics(self, request: Any, context: Context) -> Any:
        self._check_id(request.sandbox_id)
        with as_rpc_error():
            stats = await self._sandbox.sandbox_stats()
        answer = api.SandboxMetricsResponse()
        put(answer.metrics.timestamp, time.time_ns())
        answer.metrics.id = self._sandbox.id
        answer.metrics.data.type_url = stats.DESCRIPTOR.full_name
        answer.metrics.data.value = stats.SerializeToString()
        return answer

    def _check_id(self, sandbox_id: str) -> None:
        # CreateSandbox comes first and to the right shim; anything else is another's sandbox.
        if sandbox_id != self._sandbox.id:
            raise RpcError(Code.NOT_FOUND, f"sandbox {sandbox_id!r} does not exist here")
