# SPDX-License-Identifier: Apache-2.0
"""CRI's pause container: a task of the shim alone (DESIGN decision 13).

It stands for the sandbox: its Create boots the VM, its end ends it.  Nothing of it is in
the guest, which needs no process to hold its namespaces.
"""

from __future__ import annotations

from typing import Any

from agent.api import agent_pb2
from shimv2.api import task_events_pb2
from shimv2.container import Container
from shimv2.life import Life
from shimv2.process import Process, State
from shimv2.spec import HookKind
from ttrpc.errors import Code, RpcError

_SIGTERM, _SIGINT = 15, 2


class PauseContainer(Container):
    """See the module's docstring."""

    async def create(self, life: Life, mounts: list[Any]) -> None:
        """Wait for the VM; the root file system isn't needed."""
        self._life = life
        await life.guest()
        await self._run_create_hooks()

    def watch(self) -> None:
        """Nothing to watch: `kill` is its only end, besides that of the VM."""

    async def start(self) -> None:
        async with self.lock:
            self.init.require("start", State.CREATED)
            self.init.started()
            self._sandbox.events.publish(
                task_events_pb2.TaskStart(container_id=self.id, pid=self._sandbox.pid)
            )
        await self._run_hooks(HookKind.POSTSTART)

    async def kill(self, process: Process, signal: int, *, everyone: bool) -> None:
        if process.exec_id:
            await super().kill(process, signal, everyone=everyone)
            return
        self._check_signal(process, signal)
        if signal:
            # As the pause program: it leaves with 0 when told to end.
            self._exited(process, 0 if signal in (_SIGTERM, _SIGINT) else 128 + signal)
            self._sandbox.init_exited(self)

    async def start_exec(self, process: Process) -> None:
        raise RpcError(Code.UNIMPLEMENTED, f"nothing runs in the pause container {self.id!r}")

    async def pause(self) -> None:
        self._require_running("pause", paused=False)

    async def resume(self) -> None:
        self._require_running("resume", paused=True)

    async def update(self, resources: Any) -> None:
        self.init.require("update", State.CREATED, State.RUNNING)

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """It uses nothing."""
        return agent_pb2.StatsContainerResponse()
