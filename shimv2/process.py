# SPDX-License-Identifier: Apache-2.0
"""One process of a container, as containerd sees it: its state, its stdio, its end."""

from __future__ import annotations

import enum
import logging
import time
from typing import TYPE_CHECKING

import trio
from ttrpc.errors import Code, RpcError

from shimv2.api import task_types_pb2
from shimv2.stdio import Stdio

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
        self.size: tuple[int, int] | None = None  # (rows, columns) asked for before the start
        self.stdio = Stdio(
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
            container_id=container_id,
            namespace=namespace,
        )

    async def open_streams(self, guest: Guest) -> ProcessStreams:
        """The host ends of the stdio, then a raw stream to the guest for each that is used.

        Raises:
            shimv2.stdio.StdioError: names the URI that can't be used.
        """
        await self.stdio.open()
        return await guest.open_streams(
            self.container_id,
            self.exec_id,
            stdin=bool(self.stdin),
            stdout=bool(self.stdout),
            stderr=bool(self.stderr) and not self.terminal,
        )

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
        return status

    def set_exited(self, status: int) -> None:
        """The one way into STOPPED; a second call changes nothing."""
        if self.state is State.STOPPED:
            return
        self.state = State.STOPPED
        self.exit_status = status & 0xFF
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
