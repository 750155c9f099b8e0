# SPDX-License-Identifier: Apache-2.0
"""What a shim may answer, and what comes of it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from shimv2.management import client
from shimv2.management.client import FetchError, fetch

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
async def path(tmp_path: Path, nursery: Any) -> Path:
    """A socket that answers each connection with the bytes in the file `answer` beside it."""
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(tmp_path / "socket"))
    listener.listen(4)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            await stream.send_all((tmp_path / "answer").read_bytes())

    nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
    return tmp_path / "socket"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 3\r\n\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",  # as Go's do
        OK + b"\r\nabc",
    ],
)
async def test_bodies(path: Path, answer: bytes) -> None:
    path.with_name("answer").write_bytes(answer)
    assert await fetch(path, "/metrics", limit=5) == b"abc"


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (b"", 0, "closed"),
        (b"nonsense\r\n\r\n", 0, "illegal"),
        (OK + b"Content-Length: 3\r\n\r\nab", 0, "without sending complete"),
        (b"HTTP/1.1 503 X\r\nContent-Length: 4\r\n\r\nill\n", 503, "^ill$"),
        (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", 500, "status 500"),
        (OK + b"\r\n" + b"x" * 2000, 200, "more than 1000 bytes"),
    ],
)
async def test_no_bodies(
    path: Path, answer: bytes, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ANSWER_LIMIT", 1000)
    path.with_name("answer").write_bytes(answer)
    with pytest.raises(FetchError, match=said) as caught:
        await fetch(path, "/metrics", limit=5)
    assert caught.value.status == status
    assert not caught.value.gone


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="No such file") as caught:
        await fetch(tmp_path / "nothing", "/", limit=5)
    assert caught.value.gone
