# SPDX-License-Identifier: Apache-2.0
"""What every way of reaching the guest has in common."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vmm.errors import UnsupportedError, VmmGoneError
from vmm.hypervisor import SerialDevice, VsockDevice

#: How long a guest kernel may take to answer one connection request.
CONNECT_TIMEOUT = 5.0
#: Pauses between attempts while the guest boots.  Each attempt costs the guest an interrupt.
FIRST_PAUSE = 0.002
LONGEST_PAUSE = 0.010


class VsockRefused(ConnectionRefusedError):
    """Nobody in the guest listens on that port (yet), or nobody can be asked."""


class VsockNoAnswer(VsockRefused):
    """The guest has not said no either: it boots, is busy, or hangs."""


class VsockConnection:
    """A byte stream to a guest port.  Close it by ``aclose`` (or by closing `stream`).

    Attributes:
        stream: data both ways; ``send_eof`` ends the direction to the guest only.
        host_port: the port that the guest sees as its peer's.
    """

    def __init__(self, stream: trio.SocketStream, host_port: int) -> None:
        self.stream = stream
        self.host_port = host_port

    async def delivered(self) -> None:
        """Return when all that the backend had received for this connection at the time of the
        call is in `stream`'s socket.

        Returns also when the connection or the VM is gone.  Whoever waits here without reading
        may wait for ever, since a full socket takes nothing.
        """
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Drop the connection with all that is on its way in either direction."""
        self.stream.socket.close()

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()


#: Takes a connection that the guest has opened, and closes it.
Handler = Callable[[VsockConnection], Awaitable[object]]


class VsockChannel(abc.ABC):
    """Streams to the ports of one guest.  An async context manager: within the block its tasks
    run, leaving it closes every connection and removes every socket it has made.

    Attributes:
        on_driver_up: called whenever the guest's driver has started, by kinds that see it.
    """

    def __init__(self) -> None:
        self.on_driver_up: Callable[[], None] | None = None
        self._gone: str | None = None
        self._gone_scopes: set[trio.CancelScope] = set()
        self._context: AbstractAsyncContextManager[None] | None = None
        self._nursery: trio.Nursery | None = None

    @property
    @abc.abstractmethod
    def device(self) -> VsockDevice | SerialDevice:
        """What to give to `Hypervisor.add_device`."""

    @property
    def payload(self) -> tuple[int, int] | None:
        """Bytes that went to the guest and came from it, by kinds that see them."""
        return None

    @abc.abstractmethod
    async def _connect(self, port: int) -> VsockConnection:
        """One attempt; raises VsockRefused."""

    async def _ready_to_connect(self) -> None:
        """Return when an attempt may succeed; kinds that can't know don't wait."""
        return

    async def _pause(self, seconds: float) -> None:
        """Wait between two attempts; may end early when there is reason for hope."""
        await trio.sleep(seconds)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        """What lives as long as the channel."""
        async with trio.open_nursery() as self._nursery:
            yield
            # The end must not be cut short, nor an error of the block be hidden by Cancelled.
            self._nursery.cancel_scope.shield = True
            self._nursery.cancel_scope.cancel()
            self.mark_gone("the channel was closed")

    async def __aenter__(self) -> Self:
        self._context = self._open()
        await self._context.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # The block's own exception is not passed through the nursery, which would wrap it.
        assert self._context is not None
        await self._context.__aexit__(None, None, None)

    def mark_gone(self, detail: str) -> None:
        """The VM has ended: every attempt that is under way or made later raises
        VmmGoneError(detail).  The vhost-user channel finds out by itself."""
        if self._gone is None:
            self._gone = detail
        for scope in self._gone_scopes:
            scope.cancel()

    async def connect(self, port: int) -> VsockConnection:
        """Connect to a guest port.

        Raises:
            VsockRefused: nobody listens there (yet), or the guest does not answer.
            VmmGoneError: the VM has ended.
        """
        return await self._unless_gone(lambda: self._connect(port))

    async def connect_when_ready(self, port: int, timeout: float) -> VsockConnection:
        """As `connect`, but tries until the guest listens.

        Args:
            timeout: seconds.

        Raises:
            VsockRefused: it still did not when the time was over.
            VmmGoneError: the VM has ended.
        """
        with trio.move_on_after(timeout):
            return await self._unless_gone(lambda: self._keep_trying(port))
        raise VsockRefused(f"guest port {port} did not listen within {timeout:g} s")

    async def _keep_trying(self, port: int) -> VsockConnection:
        pause = FIRST_PAUSE
        while True:
            await self._ready_to_connect()
            try:
                return await self._connect(port)
            except VsockRefused:
                await self._pause(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)

    async def _unless_gone(
        self, attempt: Callable[[], Awaitable[VsockConnection]]
    ) -> VsockConnection:
        connection: VsockConnection | None = None
        if self._gone is None:
            with trio.CancelScope() as scope:
                self._gone_scopes.add(scope)
                try:
                    connection = await attempt()
                finally:
                    self._gone_scopes.discard(scope)
        if connection is None:
            raise VmmGoneError(f"no vsock to the guest: {self._gone}")
        return connection

    def listen(self, port: int, handler: Handler) -> None:
        """Let the guest connect to a host port; `handler` runs as a task of the channel for
        each connection.

        Raises:
            UnsupportedError: this kind of channel can't.
        """
        raise UnsupportedError(f"{type(self).__name__} takes no connections from the guest")

    async def serve_hybrid(self, path: Path) -> None:
        """Let other processes of this host connect to guest ports by a unix socket at `path`
        (mode 0600) and ``CONNECT port``.  Returns once it listens; ends with the channel."""
        from vmm.vsock.hybrid_server import HybridServer

        assert self._nursery is not None
        await self._nursery.start(HybridServer(self, path).run)
