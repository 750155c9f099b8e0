# SPDX-License-Identifier: Apache-2.0
"""A small HTTP/1.1 server: one connection, bounded in time and size.  h11 has the protocol."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

log = logging.getLogger("http")

TEXT: Final = "text/plain; charset=utf-8"
#: What Prometheus asks for: its text format.
EXPOSITION: Final = "text/plain; version=0.0.4; charset=utf-8"

BODY_LIMIT = 1 << 20  # bytes; the largest request there is holds the rules of a firewall
_HEAD_LIMIT = 16 << 10  # bytes of a request line and its headers
_PARAMETERS = 16  # of a query
_REQUEST_LIMIT = 10.0  # seconds for a request to arrive, and for a connection to stay idle
_ANSWER_LIMIT = 60.0  # what an answer waits for has shorter limits of its own
_READER_LIMIT = 30.0  # seconds for the client to take an answer
_CHUNK = 64 << 10


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks.

    Attributes:
        path: decoded, without the query.
        query: the first value of each parameter, decoded.
        headers: by lower-cased name.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """What it gets."""

    body: bytes | str = b""
    status: int = 200
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


class HttpError(Exception):
    """An answer other than 200; the message is its body."""

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()):
        super().__init__(message)
        self.status = status
        self.headers = headers

    @property
    def response(self) -> Response:
        return Response(f"{self}\n", self.status, headers=self.headers)


Answer = Callable[[Request], Awaitable[Response]]


async def serve_connection(stream: trio.abc.Stream, answer: Answer) -> None:
    """Serve requests one after the other until the client or a limit ends it; closes the stream.

    Args:
        answer: an HttpError that it raises is the response; another exception is logged and
            becomes status 500 without a word of it.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_LIMIT)
    async with stream:
        try:
            while True:
                request = None
                try:
                    with trio.move_on_after(_REQUEST_LIMIT) as scope:
                        request = await _receive(connection, stream)
                    if scope.cancelled_caught or request is None:
                        return
                    response = await _answered(answer, request)
                except h11.RemoteProtocolError as error:
                    response = Response(f"{error}\n", error.error_status_hint)
                except HttpError as error:
                    response = error.response
                with trio.fail_after(_READER_LIMIT):
                    only_head = request is not None and request.method == "HEAD"
                    await _send(connection, stream, response, only_head=only_head)
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return
                connection.start_next_cycle()
        except (trio.BrokenResourceError, trio.TooSlowError):
            return


async def _answered(answer: Answer, request: Request) -> Response:
    try:
        with trio.fail_after(_ANSWER_LIMIT):
            return await answer(request)
    except HttpError:
        raise
    except trio.TooSlowError:
        raise HttpError(HTTPStatus.GATEWAY_TIMEOUT, f"no answer in {_ANSWER_LIMIT:g} s") from None
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        raise HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the log") from None


async def _receive(connection: h11.Connection, stream: trio.abc.Stream) -> Request | None:
    """The next request with its whole body; None if there is none."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                data = connection.send(go_on)
                assert data is not None
                await stream.send_all(data)
            connection.receive_data(bytes(await stream.receive_some(_CHUNK)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            if len(body) + len(event.data) > BODY_LIMIT:
                raise HttpError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body is at most {BODY_LIMIT} bytes"
                )
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            return _request(head, bytes(body))
        else:  # ConnectionClosed, or PAUSED before the next cycle
            return None


def _request(head: h11.Request, body: bytes) -> Request:
    try:
        parts = urlsplit(head.target.decode("ascii"))
        query = dict(reversed(parse_qsl(parts.query, True, max_num_fields=_PARAMETERS)))
    except ValueError as error:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"target {head.target!r}: {error}") from error
    headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
    return Request(head.method.decode(), unquote(parts.path), query, body, headers)


async def _send(
    connection: h11.Connection, stream: trio.abc.Stream, response: Response, *, only_head: bool
) -> None:
    body = response.body.encode() if isinstance(response.body, str) else response.body
    headers = [
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(body))),
        *response.headers,
    ]
    if connection.their_state is not h11.DONE:  # the rest of its request is never read
        headers.append(("Connection", "close"))
    out = connection.send(h11.Response(status_code=response.status, headers=headers)) or b""
    if not only_head:
        out += connection.send(h11.Data(data=body)) or b""
    out += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(out)
