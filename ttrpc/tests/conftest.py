# SPDX-License-Identifier: Apache-2.0
"""A client and a server at the two ends of one connection."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from ttrpc.client import Client
from ttrpc.server import Server
from ttrpc.tests.echo import ECHO, Echo


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Both ends of a unix socket."""
    one, other = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    return trio.SocketStream(one), trio.SocketStream(other)


class Pair:
    """What the fixture gives: both ends and what they were made of."""

    def __init__(self, server: Server, echo: Echo, client: Client, nursery: trio.Nursery) -> None:
        self.server = server
        self.echo = echo
        self.client = client
        self.stub = client.stub(ECHO)
        self.nursery = nursery


@pytest.fixture(params=["unix", "memory"])
def streams(request: pytest.FixtureRequest) -> Callable[[], tuple[Any, Any]]:
    """Makes the two ends of a connection."""
    return socket_streams if request.param == "unix" else trio.testing.memory_stream_pair


@pytest.fixture
async def pair(streams: Callable[[], tuple[Any, Any]]) -> AsyncIterator[Pair]:
    """An Echo server and its client over either kind of stream; fails after 30 s."""
    async with make_pair(*streams()) as made:
        yield made


@asynccontextmanager
async def make_pair(at_server: Any, at_client: Any, **limits: int) -> AsyncIterator[Pair]:
    server, echo = Server(**limits), Echo()
    server.register(ECHO, echo)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            async with Client(at_client) as client:
                yield Pair(server, echo, client, nursery)
            await server.shutdown(0)
            nursery.cancel_scope.cancel()
