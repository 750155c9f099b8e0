# SPDX-License-Identifier: Apache-2.0
"""The stdio of one process: its raw streams from the guest, tied to what containerd asked for.

Order of calls::

    async with Stdio(stdin=…, stdout=…, stderr=…, terminal=False,
                     container_id="web", namespace="default") as stdio:
        await stdio.open()                        # before the process is made
        stdio.start(writer, out_reader, err_reader)
        …                                         # WaitProcess answered
        await stdio.drained(timeout=5.0)          # then the exit event
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import trio

from shimv2.endpoints import (
    Sink,
    StdioError,
    check_source,
    open_sink,
    open_source,
    split_uri,
)
from shimv2.logger_binary import SCHEMES, BinaryLogger
from shimv2.pumps import GuestReader, GuestWriter, InputPump, OutputPump

__all__ = ["GuestReader", "GuestWriter", "Stdio", "StdioError"]

log = logging.getLogger(__name__)


class Stdio:
    """Async context manager; it owns the tasks that move bytes, and closes all it opened.

    Args:
        stdin, stdout, stderr: paths or URIs as in CreateTask or Exec, "" for none.
        terminal: stderr does not exist.
        container_id, namespace: for a logger's environment.
        mount_namespace: descriptor of the host's, where a logger is to run.
    """

    def __init__(
        self,
        *,
        stdin: str,
        stdout: str,
        stderr: str,
        terminal: bool,
        container_id: str,
        namespace: str,
        mount_namespace: int | None = None,
    ) -> None:
        self._uris = (stdin, stdout, "" if terminal else stderr)
        self._terminal = terminal
        self._container_id = container_id
        self._namespace = namespace
        self._mount_namespace = mount_namespace
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None
        self._logger: BinaryLogger | None = None
        self._writer: GuestWriter | None = None  # until `feed`
        self._sinks: list[Sink] = []
        self._outputs: list[OutputPump] = []
        self._input: InputPump | None = None
        self._stdin_closed = False

    @property
    def wants_stdin(self) -> bool:
        """Whether the process gets a stdin at all."""
        return bool(self._uris[0])

    @property
    def wants_stderr(self) -> bool:
        """Whether there is a stderr apart from stdout.  A reader given to `start` without a
        sink is read and thrown away, so that the process never waits for nobody."""
        return not self._terminal

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        # What the block raised is not a failure of the nursery's, which would wrap it in a group.
        ours = (exc_type, exc, tb) if isinstance(exc, trio.Cancelled) else (None, None, None)
        try:
            await self._stack.__aexit__(*ours)
        finally:
            self._close_unused()
            with trio.CancelScope(shield=True):
                if self._writer is not None:
                    await self._writer.aclose()
            if self._logger is not None:
                logger, self._logger = self._logger, None
                await logger.stop()

    async def open(self) -> None:
        """Open the host's ends.

        Raises:
            StdioError: one can't be opened; nothing stays open.  It names the URI.
        """
        try:
            await self._open()
        except BaseException:
            self._close_unused()
            if self._logger is not None:
                logger, self._logger = self._logger, None
                await logger.stop()
            raise

    async def _open(self) -> None:
        stdin, stdout, stderr = self._uris
        if stdin:
            check_source(stdin)
        program = next((uri for uri in (stdout, stderr) if split_uri(uri)[0] in SCHEMES), "")
        if program:
            self._logger = await BinaryLogger.start(
                program,
                container_id=self._container_id,
                namespace=self._namespace,
                mount_namespace=self._mount_namespace,
            )
            self._sinks = [self._logger.stdout, self._logger.stderr]
            return
        self._sinks = [open_sink(stdout) if stdout else Sink.null()]
        if stdout and not self._terminal and (stderr == stdout or stdout.startswith("file://")):
            self._sinks.append(self._sinks[0].duplicate())  # file:// takes both
        else:
            self._sinks.append(open_sink(stderr) if stderr else Sink.null())

    def start(
        self,
        stdin: GuestWriter | None,
        stdout: GuestReader | None,
        stderr: GuestReader | None,
        *,
        feed: bool = True,
    ) -> None:
        """Begin to move bytes, after `open`; the streams are closed by us from here on.

        Args:
            feed: stdin too, not only with a later `feed`.
        """
        assert self._nursery is not None
        for name, reader in (("stdout", stdout), ("stderr", stderr)):
            sink = self._sinks.pop(0)
            if reader is None:
                sink.close()
                continue
            pump = OutputPump(f"{name} of {self._container_id}", reader, sink)
            self._outputs.append(pump)
            self._nursery.start_soon(pump.run, name=f"{name} {self._container_id}")
        if stdin is not None and not self.wants_stdin:
            self._nursery.start_soon(stdin.aclose, name=f"stdin {self._container_id}")
        elif stdin is not None:
            self._writer = stdin
            if feed:
                self.feed()

    def feed(self) -> None:
        """Let stdin through, after `start`.  Idempotent.

        Until then a client that opens the fifo has to wait: one whose input is short would call
        CloseIO for a container that containerd does not know yet, and never again (nerdctl).
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        assert self._nursery is not None
        try:
            source = open_source(self._uris[0])
        except StdioError as error:
            log.warning("%s", error)
            self._nursery.start_soon(writer.aclose, name=f"stdin {self._container_id}")
            return
        self._input = InputPump(f"stdin of {self._container_id}", source, writer)
        if self._stdin_closed:
            self._input.finish()
        self._nursery.start_soon(self._input.run, name=f"stdin {self._container_id}")

    async def drained(self, timeout: float) -> None:
        """After the process has ended: return when all it had written is in the fifo, the file
        or the logger's pipe, or after `timeout` seconds (nobody reads a full fifo)."""
        with trio.move_on_after(timeout) as scope:
            async with trio.open_nursery() as nursery:
                for pump in self._outputs:
                    nursery.start_soon(pump.drained)
        if scope.cancelled_caught:
            log.warning("output of %s was not taken within %.1f s", self._container_id, timeout)

    async def close_stdin(self) -> None:
        """CloseIO: what the fifo holds is delivered, then stdin ends.  Returns at once, since
        the process may take its time to read.  Idempotent."""
        self._stdin_closed = True
        self.feed()
        if self._input is not None:
            self._input.finish()
        await trio.lowlevel.checkpoint()

    def _close_unused(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []
