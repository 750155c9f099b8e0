# SPDX-License-Identifier: Apache-2.0
"""A hybrid vsock socket of our own, for other processes of this host (debug console)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import trio

from vmm.errors import VmmError
from vmm.vsock.channel import VsockChannel, VsockRefused
from vmm.vsock.hybrid_protocol import MAX_LINE, HandshakeError, ServerHandshake

MAX_CLIENTS = 64
HANDSHAKE_TIMEOUT = 10.0
_CHUNK = 64 << 10


class HybridServer:
    """Serves ``CONNECT port`` on a unix socket.

    Args:
        channel: makes the connections.
        path: the socket; mode 0600, removed at the end.
    """

    def __init__(self, channel: VsockChannel, path: Path) -> None:
        self._channel = channel
        self._path = path
        self._slots = trio.CapacityLimiter(MAX_CLIENTS)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled; reports that it has started once it listens."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with trio.socket.from_stdlib_socket(listener) as server:
            listener.setblocking(False)
            listener.bind(os.fspath(self._path))
            try:
                self._path.chmod(0o600)
                listener.listen(MAX_CLIENTS)
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    while True:
                        client, _ = await server.accept()
                        nursery.start_soon(self._serve, trio.SocketStream(client))
            finally:
                self._path.unlink(missing_ok=True)

    async def _serve(self, client: trio.SocketStream) -> None:
        async with client, self._slots:
            try:
                handshake = ServerHandshake()
                with trio.fail_after(HANDSHAKE_TIMEOUT):
                    while not handshake.receive(await client.receive_some(MAX_LINE)):
                        pass
                    connection = await self._channel.connect(handshake.port)
                async with connection:
                    await client.send_all(ServerHandshake.accept(connection.host_port))
                    if handshake.rest:
                        await connection.stream.send_all(handshake.rest)
                    await _join(client, connection.stream)
            except* (HandshakeError, VsockRefused, VmmError, trio.TooSlowError):
                pass  # a refusal is the silent end of the connection
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass


async def _join(one: trio.SocketStream, other: trio.SocketStream) -> None:
    """Copy both ways until both have ended; each end of stream is passed on."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_copy, one, other)
        nursery.start_soon(_copy, other, one)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    while data := await source.receive_some(_CHUNK):
        await sink.send_all(data)
    await sink.send_eof()
