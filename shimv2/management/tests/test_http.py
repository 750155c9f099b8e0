# SPDX-License-Identifier: Apache-2.0
"""The HTTP server by what it answers to bytes."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from shimv2.management import http
from shimv2.management.http import HttpError, Request, Response, serve_connection

PIECES = (
    b"GET / HTTP/1.1\r\nHost: x\r\n",
    b"PUT /%ff HTTP/1.1\r\nHost: x\r\n",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"\r\n",
    b"3\r\nabc\r\n0\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
)


async def _echo(request: Request) -> Response:
    if request.path == "/refused":
        raise HttpError(409, "not now")
    if request.path == "/broken":
        raise ValueError("a secret")
    return Response(f"{request.method} {request.path} {dict(request.query)} {request.body!r}")


async def _talk(data: bytes, *, close: bool = True) -> bytes:
    """All that the server says to these bytes until it closes."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, server, _echo)
        await client.send_all(data)
        if close:
            await client.send_eof()
        said = b""
        while more := await client.receive_some():
            said += more
    return said


async def test_a_request_and_the_next_one_on_the_same_connection() -> None:
    said = await _talk(
        b"GET /a%20b?x=1&x=2&y=%2F HTTP/1.1\r\nHost: x\r\n\r\n"
        b"PUT /c HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    )
    assert said.count(b"HTTP/1.1 200") == 2
    assert b"GET /a b {'y': '/', 'x': '1'} b''" in said
    assert b"PUT /c {} b'abc'" in said


async def test_chunks_and_expectations() -> None:
    said = await _talk(
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n"
    )
    assert b"b'abc'" in said
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, server, _echo)
        await client.send_all(
            b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await client.receive_some()).startswith(b"HTTP/1.1 100 ")
        await client.send_all(b"z")
        assert b"b'z'" in await client.receive_some()
        nursery.cancel_scope.cancel()


async def test_head_has_no_body() -> None:
    said = await _talk(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200")
    assert said.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [("/refused", b"409", b"not now\n"), ("/broken", b"500", b"internal error; see the log\n")],
)
async def test_errors(path: str, status: bytes, text: bytes) -> None:
    said = await _talk(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.1 " + status)
    assert said.endswith(text)
    assert b"secret" not in said


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET /" + b"a" * 20000, b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + b"a" * 1100000, b"413"),
        (
            b"GET /?"
            + b"&".join([b"a=1"] * 17)
            + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            b"400",
        ),
    ],
)
async def test_what_is_refused(data: bytes, status: bytes) -> None:
    said = await _talk(data, close=False)
    assert said.startswith(b"HTTP/1.1 " + status)


async def test_half_a_request_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    client, server = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, server, _echo)
        await client.send_all(b"GET / HTTP/1.1\r\n")
        assert await client.receive_some() == b""
    assert trio.current_time() - began == pytest.approx(http._REQUEST_LIMIT)


async def test_an_answer_that_never_comes(autojump_clock: trio.testing.MockClock) -> None:
    async def never(_: Request) -> Response:
        await trio.sleep_forever()
        raise AssertionError

    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, server, never)
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.receive_some()).startswith(b"HTTP/1.1 504")
        nursery.cancel_scope.cancel()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=200) | st.sampled_from(PIECES), max_size=8))
def test_any_bytes_end_in_an_answer_or_in_the_end(pieces: list[bytes]) -> None:
    said = trio.run(_talk, b"".join(pieces))
    assert said == b"" or said.startswith(b"HTTP/1.1 ")
    assert b"internal error" not in said
