# SPDX-License-Identifier: Apache-2.0
"""Moves a Connection's bytes over a trio stream, and bounds what waits on either side."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

import trio

from ttrpc.errors import RpcError
from ttrpc.protocol import Connection

HIGH_WATER = 8 << 20
"""Bytes waiting for the peer to read; who would add to more waits."""

INBOX_MESSAGES = 1024
INBOX_BYTES = 8 << 20
"""What of one stream may wait for its reader: then nothing more is read from the peer ..."""

INBOX_PATIENCE = 1.0
"""... for so many seconds (as in the Go implementation), after which that stream fails."""

_RECEIVE_SIZE = 64 << 10
_RECEIVE_SIZE_MAX = 1 << 20


class Transport:
    """The stream's sending and receiving side.

    Args:
        stream: belongs to the Transport until it is closed.
        connection: whose bytes are moved.
        on_broken: called once with a reason when the peer can't be written to any longer.

    Resource handling: run() is the writer's task and has to run in the owner's nursery;
    close the stream with aclose().
    """

    def __init__(
        self, stream: trio.abc.Stream, connection: Connection, on_broken: Callable[[str], None]
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._on_broken = on_broken
        self._rest = b""
        self._sending = 0
        self._broken = False
        self._work = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._idle = trio.lowlevel.ParkingLot()
        # On a socket a write is tried at once: two passes of the scheduler less per call.
        self._socket = stream.socket if type(stream) is trio.SocketStream else None

    @property
    def backlog(self) -> int:
        """Bytes that the peer has not taken yet."""
        return self._sending + len(self._rest) + self._connection.queued

    def flush(self, *, now: bool) -> None:
        """See that what the connection has queued is sent.

        Args:
            now: nothing more is to be expected in this pass of the scheduler, so it isn't worth
                waiting to send several frames with one system call.
        """
        if self._broken:
            self._connection.data_to_send()
            return
        if not now or self._socket is None or self._sending or self._rest:
            self._work.unpark()
            return
        data = self._connection.data_to_send()
        if not data:
            return
        try:
            sent = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._break(f"the peer can't be written to: {error.strerror}")
            return
        if sent < len(data):
            self._rest = data[sent:]
            self._work.unpark()

    async def run(self) -> None:
        """Send what flush() leaves, until the stream breaks."""
        while not self._broken:
            data = self._rest or self._connection.data_to_send()
            if not data:
                self._idle.unpark_all()
                await self._work.park()
                continue
            self._rest = b""
            self._sending = len(data)
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                cause = error.__cause__ or error
                self._break(f"the peer can't be written to: {cause}")
                return
            finally:
                self._sending = 0
            if self.backlog <= HIGH_WATER:
                self._room.unpark_all()

    def _break(self, reason: str) -> None:
        self._broken = True
        self._rest = b""
        self._connection.data_to_send()
        self._room.unpark_all()
        self._idle.unpark_all()
        self._work.unpark_all()
        self._on_broken(reason)

    async def wait_room(self) -> None:
        """Wait while more than HIGH_WATER is waiting. Not a checkpoint if there is room."""
        while self.backlog > HIGH_WATER and not self._broken:
            await self._room.park()

    async def wait_sent(self) -> None:
        """Wait until the stream has taken everything, or is broken."""
        while self.backlog and not self._broken:
            self._work.unpark()
            await self._idle.park()

    async def receive(self) -> bytes:
        """The next bytes of the peer; b"" at its end.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: the stream broke, or was closed.
        """
        size = min(max(self._connection.missing, _RECEIVE_SIZE), _RECEIVE_SIZE_MAX)
        if self._socket is None:
            return bytes(await self._stream.receive_some(size))
        while True:
            # Mostly there is nothing yet, so unlike receive_some() this waits first.
            try:
                await trio.lowlevel.wait_readable(self._socket)
                return os.read(self._socket.fileno(), size)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(error.strerror) from error

    async def aclose(self) -> None:
        """Close the stream at once."""
        await trio.aclose_forcefully(self._stream)


class Inbox:
    """Messages of one stream on their way from the connection's reader to its user."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._ended = False
        self._error: RpcError | None = None
        self._reader = trio.lowlevel.ParkingLot()
        self._writer = trio.lowlevel.ParkingLot()

    @property
    def full(self) -> bool:
        """Whether the connection's reader has to wait."""
        return not self._error and (
            len(self._messages) >= INBOX_MESSAGES or self._bytes >= INBOX_BYTES
        )

    def put(self, payload: bytes | None, end: bool) -> None:
        """Add a message (unless None), and the end of them if so said."""
        if payload is not None and not self._ended:
            self._messages.append(payload)
            self._bytes += len(payload)
        self._ended |= end
        self._reader.unpark_all()

    def fail(self, error: RpcError) -> None:
        """End the stream with an error: seen after the messages that came before it."""
        if not self._ended:
            self._ended = True
            self._error = error
        self._reader.unpark_all()
        self._writer.unpark_all()

    async def get(self) -> bytes | None:
        """The next message; None at the end.

        Raises:
            RpcError: what fail() was called with.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._messages:
            if self._error is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                raise self._error
            if self._ended:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return None
            await self._reader.park()
        payload = self._messages.popleft()
        self._bytes -= len(payload)
        self._writer.unpark_all()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return payload

    async def wait_room(self) -> bool:
        """Wait until its user takes a message. False: the user didn't in INBOX_PATIENCE."""
        with trio.move_on_after(INBOX_PATIENCE):
            while self.full:
                await self._writer.park()
            return True
        return False
