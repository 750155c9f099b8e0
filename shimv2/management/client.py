# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 from a program that speaks trio: asks a shim by its socket, or sends to a collector."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import h11
import trio

_ANSWER_LIMIT = 16 << 20  # bytes
_CHUNK = 64 << 10


class FetchError(Exception):
    """No answer, or one that is none; the message says why.

    Attributes:
        status: of the HTTP answer; 0 if there was none.
        gone: nobody listens at that socket.
    """

    def __init__(self, message: str, *, status: int = 0, gone: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.gone = gone


async def fetch(socket: Path, target: str, *, limit: float) -> bytes:
    """The body of the answer to GET.

    Args:
        target: path and query, encoded.
        limit: seconds for all of it.

    Raises:
        FetchError: nobody listens, no answer in time, one too long, or another status than 200.
    """
    async with _connected(
        str(socket), partial(trio.open_unix_socket, str(socket)), limit
    ) as stream:
        return await _exchange(stream, "GET", target)


async def post(
    host: str, port: int, target: str, body: bytes, content_type: str, *, limit: float
) -> bytes:
    """The body of the answer to POST, over TCP.

    Raises:
        FetchError: as `fetch`.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    async with _connected(where, partial(trio.open_tcp_stream, host, port), limit) as stream:
        return await _exchange(stream, "POST", target, where, body, content_type)


@asynccontextmanager
async def _connected(
    where: str, connect: Callable[[], Awaitable[trio.SocketStream]], limit: float
) -> AsyncIterator[trio.SocketStream]:
    """A connection for one exchange; what goes wrong with either is a FetchError."""
    try:
        with trio.fail_after(limit):
            try:
                stream = await connect()
            except OSError as error:
                raise FetchError(f"{where}: {error.strerror or error}", gone=True) from error
            async with stream:
                yield stream
    except trio.TooSlowError:
        raise FetchError(f"{where}: no answer in {limit:g} s") from None
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        raise FetchError(f"{where}: {error}") from error


async def _exchange(
    stream: trio.SocketStream,
    method: str,
    target: str,
    host: str = "localhost",
    body: bytes = b"",
    content_type: str = "",
) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", host), ("Connection", "close")]
    if body:
        headers += [("Content-Type", content_type), ("Content-Length", str(len(body)))]
    request = connection.send(h11.Request(method=method, target=target, headers=headers))
    assert request is not None
    request += connection.send(h11.Data(data=body)) or b"" if body else b""
    await stream.send_all(request + (connection.send(h11.EndOfMessage()) or b""))
    return await _answer(connection, stream)


async def _answer(connection: h11.Connection, stream: trio.SocketStream) -> bytes:
    status = 0
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(_CHUNK)))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _ANSWER_LIMIT:
                raise FetchError(f"an answer of more than {_ANSWER_LIMIT} bytes", status=status)
        elif isinstance(event, h11.EndOfMessage):
            break
        elif isinstance(event, h11.ConnectionClosed):
            raise FetchError("closed without an answer")
    if status != 200:
        text = bytes(body[:1000]).decode(errors="replace").strip()
        raise FetchError(text or f"status {status}", status=status)
    return bytes(body)
