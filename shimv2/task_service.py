# SPDX-License-Identifier: Apache-2.0
"""containerd's Task API, version 2 and 3: it translates, `Sandbox` decides.

The two versions have equal messages in different packages, so one implementation is made
for each descriptor.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

from google.protobuf import empty_pb2

from shimv2.errors import as_rpc_error
from shimv2.process import Process
from shimv2.timestamps import put
from ttrpc.errors import Code, RpcError

if TYPE_CHECKING:
    from shimv2.sandbox import Sandbox
    from ttrpc.server import Context

_EMPTY = empty_pb2.Empty()


class TaskService:
    """Serves one version of the Task service.

    Args:
        sandbox: decides.
        messages: the generated module of that version (task_v2_pb2 or task_v3_pb2).
    """

    def __init__(self, sandbox: Sandbox, messages: ModuleType) -> None:
        self._sandbox = sandbox
        self._messages = messages

    async def Create(self, request: Any, context: Context) -> Any:
        if request.checkpoint:
            raise RpcError(Code.UNIMPLEMENTED, "restore from a checkpoint is not supported")
        with as_rpc_error():
            await self._sandbox.create(request)
        return self._messages.CreateTaskResponse(pid=self._sandbox.pid)

    async def Start(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            await self._sandbox.start(request.id, request.exec_id)
        return self._messages.StartResponse(pid=self._sandbox.pid)

    async def Delete(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            process = await self._sandbox.delete(request.id, request.exec_id)
        answer = self._messages.DeleteResponse(
            pid=self._sandbox.pid, exit_status=process.exit_status
        )
        _set_time(answer.exited_at, process.exited_at)
        return answer

    async def Exec(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            container, _ = self._sandbox.find(request.id)
            container.add_exec(request)
        return _EMPTY

    async def State(self, request: Any, context: Context) -> Any:
        container, process = self._sandbox.find(request.id, request.exec_id)
        answer = self._messages.StateResponse(
            id=container.id,
            bundle=container.bundle,
            pid=self._sandbox.pid,
            status=container.status_of(process),
            stdin=process.stdin,
            stdout=process.stdout,
            stderr=process.stderr,
            terminal=process.terminal,
            exit_status=process.exit_status,
            exec_id=process.exec_id,
        )
        _set_time(answer.exited_at, process.exited_at)
        return answer

    async def Pids(self, request: Any, context: Context) -> Any:
        self._sandbox.find(request.id)
        answer = self._messages.PidsResponse()
        # Never empty: containerd would take the shim for leaked after its restart.
        answer.processes.add(pid=self._sandbox.pid)
        return answer

    async def Pause(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            container, _ = self._sandbox.find(request.id)
            await container.pause()
        return _EMPTY

    async def Resume(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            container, _ = self._sandbox.find(request.id)
            await container.resume()
        return _EMPTY

    async def Checkpoint(self, request: Any, context: Context) -> Any:
        raise RpcError(Code.UNIMPLEMENTED, "checkpoint is not supported")

    async def Kill(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            container, process = self._sandbox.find(request.id, request.exec_id)
            await container.kill(process, request.signal, everyone=request.all)
        return _EMPTY

    async def ResizePty(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            container, process = self._sandbox.find(request.id, request.exec_id)
            await container.resize_pty(process, rows=request.height, columns=request.width)
        return _EMPTY

    async def CloseIO(self, request: Any, context: Context) -> Any:
        _, process = self._sandbox.find(request.id, request.exec_id)
        if request.stdin:
            with as_rpc_error():
                await process.stdio.close_stdin()
        return _EMPTY

    async def Update(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            container, _ = self._sandbox.find(request.id)
            await container.update(request.resources)
        return _EMPTY

    async def Wait(self, request: Any, context: Context) -> Any:
        _, process = self._sandbox.find(request.id, request.exec_id)
        await process.exited.wait()
        return self._wait_answer(process)

    async def Stats(self, request: Any, context: Context) -> Any:
        with as_rpc_error():
            stats = await self._sandbox.stats(request.id)
        answer = self._messages.StatsResponse()
        answer.stats.type_url = stats.DESCRIPTOR.full_name
        answer.stats.value = stats.SerializeToString()
        return answer

    async def Connect(self, request: Any, context: Context) -> Any:
        return self._messages.ConnectResponse(
            shim_pid=os.getpid(), task_pid=self._sandbox.pid, version="3"
        )

    async def Shutdown(self, request: Any, context: Context) -> Any:
        await self._sandbox.shutdown(now=request.now, container_id=request.id)
        return _EMPTY

    def _wait_answer(self, process: Process) -> Any:
        answer = self._messages.WaitResponse(exit_status=process.exit_status)
        _set_time(answer.exited_at, process.exited_at)
        return answer


def _set_time(field: Any, nanoseconds: int) -> None:
    if nanoseconds:
        put(field, nanoseconds)
