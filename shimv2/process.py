# SPDX-License-Identifier: Apache-2.0
"""One process of a container, as containerd sees it: its state, its stdio, its end."""

from __future__ import annotations

import enum
import logging
import time
from typing import TYPE_CHECKING

import trio

from shimv2.api import task_types_pb2
from shimv2.stdio import Stdio
from ttrpc.errors import Code, RpcError

if TYPE_CHECKING:
    from shimv2.guest import Guest
    from shimv2.streams import ProcessStreams

log = logging.getLogger("process")

LOST_STATUS = 255  # the VM or its agent went away (DESIGN decision 12)

# After a process has ended its output is on the host already (the agent sees to that); this
# bounds how long a reader that doesn't read can hold back the exit event.
_DRAIN_LIMIT = 5.0


class State(enum.Enum):
    """The life of a process; the values are containerd's."""

    CREATED = task_types_pb2.CREATED
    RUNNING = task_types_pb2.RUNNING
    STOPPED = task_types_pb2.STOPPED


class Process:
    """An init process (exec_id "") or an exec.

    Args:
        host_mounts: descriptor of the host's mount namespace, where loggers run.

    Attributes:
        exit_status: 0–255, valid once `exited` is set.
        exited_at: nanoseconds since the epoch, 0 before.
    """

    def __init__(
        self,
        *,
        container_id: str,
        exec_id: str,
        namespace: str,
        terminal: bool,
        stdin: str,
        stdout: str,
        stderr: str,
        host_mounts: int,
    ) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.terminal = terminal
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.state = State.CREATED
        self.exit_status = 0
        self.exited_at = 0
        self.exited = trio.Event()
        self.lock = trio.Lock()  # an exec's start and delete
        self.size: tuple[int, int] | None = None  # (rows, columns) asked for before the start
        self.stdio = Stdio(
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
            container_id=container_id,
            namespace=namespace,
            mount_namespace=host_mounts,
        )
        self._stdio_close = trio.Event()
        self._stdio_closed: trio.Event | None = None  # None until it is open

    async def open_streams(self, guest: Guest, nursery: trio.Nursery) -> ProcessStreams:
        """The host ends of the stdio, owned by a task in `nursery`, then the guest's.

        Raises:
            shimv2.stdio.StdioError: names the URI that can't be used.
        """
        await nursery.start(self._hold_stdio)
        # Streams that nobody asked for are read and thrown away, and an absent stdin is ended
        # at once; a terminal without stdin just stays silent.
        return await guest.open_streams(
            self.container_id,
            self.exec_id,
            stdin=bool(self.stdin) or not self.terminal,
            stderr=not self.terminal,
        )

    async def _hold_stdio(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with self.stdio:
                await self.stdio.open()
                self._stdio_closed = trio.Event()
                task_status.started()
                try:
                    await self._stdio_close.wait()
                finally:
                    self._stdio_closed.set()
        except Exception:
            if self._stdio_closed is None:
                raise
            # It has no say in what becomes of the sandbox's other processes.
            log.exception("stdio of %s", self.describe())

    async def close_stdio(self) -> None:
        """Let go of the host's ends; what a descendant still writes is lost.  Idempotent."""
        self._stdio_close.set()
        if self._stdio_closed is not None:
            await self._stdio_closed.wait()

    async def wait_in_guest(self, guest: Guest) -> int:
        """Until the process has ended and its output is delivered; its status.

        A guest that is lost ends every process with 255.
        """
        try:
            status = await guest.wait_process(self.container_id, self.exec_id)
        except RpcError as error:
            log.warning("process %s/%s lost: %s", self.container_id, self.exec_id, error.message)
            return LOST_STATUS
        await self.stdio.drained(_DRAIN_LIMIT)
        if not 0 <= status <= 255:
            log.warning("process %s/%s: status %d", self.container_id, self.exec_id, status)
            return LOST_STATUS
        return status

    def started(self) -> None:
        """CREATED → RUNNING, unless the guest was lost in the same moment.

        Raises:
            RpcError: it was.
        """
        if self.state is State.STOPPED:
            raise RpcError(Code.UNAVAILABLE, f"{self.describe()} was lost with its guest")
        self.state = State.RUNNING

    def set_exited(self, status: int) -> None:
        """The one way into STOPPED; a second call changes nothing."""
        if self.state is State.STOPPED:
            return
        self.state = State.STOPPED
        self.exit_status = status & 0xFF  # a pause container may get a signal above 127
        self.exited_at = time.time_ns()
        self.exited.set()

    def require(self, action: str, *states: State) -> None:
        """Raises FailedPrecondition unless the process is in one of `states`."""
        if self.state not in states:
            raise RpcError(
                Code.FAILED_PRECONDITION,
                f"cannot {action} {self.describe()}: it is {self.state.name.lower()}",
            )

    def describe(self) -> str:
        """How errors name this process."""
        if self.exec_id:
            return f"exec {self.exec_id!r} of container {self.container_id!r}"
        return f"container {self.container_id!r}"
