# SPDX-License-Identifier: Apache-2.0
"""Our client and server against containerd's Go implementation."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.wrappers_pb2 import BytesValue, DoubleValue, Int64Value, StringValue
from trio.testing import wait_all_tasks_blocked

from integration.ttrpc.peer import go_peer
from ttrpc.client import Client
from ttrpc.errors import Code, ConnectionLost, RpcError
from ttrpc.protocol import MAX_MESSAGE, Connection, ResponseReceived, Role
from ttrpc.server import Server
from ttrpc.tests.echo import ECHO, Echo

pytestmark = pytest.mark.go


@pytest.fixture
def go_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The path of a Go server's socket, and the process."""
    path = str(tmp_path / "s")
    with subprocess.Popen(
        [*go_peer(), "serve", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        yield path, process
        process.stdin.close()
        process.wait(10)


@asynccontextmanager
async def client_of(path: str) -> AsyncIterator[tuple[Client, Any]]:
    with trio.fail_after(60):
        async with Client(await trio.open_unix_socket(path)) as client:
            yield client, client.stub(ECHO)


async def failure(call: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await call
    return caught.value


GoServer = tuple[str, subprocess.Popen[bytes]]


async def test_our_client_calls(go_server: GoServer) -> None:
    async with client_of(go_server[0]) as (client, stub):
        for size in (0, 5, 200_000, MAX_MESSAGE - 60):
            assert len((await stub.Echo(BytesValue(value=bytes(size)))).value) == size
        error = await failure(stub.Fail(StringValue(value="no such thing")))
        assert (error.code, error.message) == (Code.NOT_FOUND, "no such thing")
        text = StringValue()
        assert [detail.Unpack(text) for detail in error.details] == [True]
        assert text.value == "a detail"
        assert (await failure(stub.Missing(StringValue()))).code is Code.UNIMPLEMENTED
        raw = await client._unary("no.Service", "Method", b"", 0, ())
        assert raw.code == Code.UNIMPLEMENTED
        metadata = {"key": ["one", "two"], "other": "three"}
        assert (await stub.Metadata(StringValue(value="key"), metadata=metadata)).value == "one,two"


async def test_our_clients_deadlines(go_server: GoServer) -> None:
    async with client_of(go_server[0]) as (client, stub):
        assert 10 < (await stub.Deadline(StringValue(), timeout=20)).value <= 20
        error = await failure(stub.Sleep(DoubleValue(value=60), timeout=0.05))
        assert error.code is Code.DEADLINE_EXCEEDED
        # Go's own deadline, seen because ours isn't set.
        payload = DoubleValue(value=60).SerializeToString()
        raw = await client._unary("pykata.test.Echo", "Sleep", payload, 50_000_000, ())
        assert raw.code == Code.DEADLINE_EXCEEDED
        with trio.move_on_after(0.05):
            await stub.Sleep(DoubleValue(value=60))
        assert (await stub.Echo(BytesValue(value=b"alive"))).value == b"alive"


async def test_our_client_streams(go_server: GoServer) -> None:
    async with client_of(go_server[0]) as (_, stub):
        async with stub.Sum() as stream:
            for number in range(1000):
                await stream.send(Int64Value(value=number))
            await stream.close_send()
            assert (await stream.receive()).value == 499500
        async with stub.Count(Int64Value(value=5000)) as stream:
            assert [reply.value async for reply in stream] == list(range(5000))
        async with stub.Count(Int64Value(value=-1)) as stream:
            assert (await failure(stream.receive())).code is Code.OUT_OF_RANGE
        async with stub.Chat() as stream:
            for number in range(100):
                await stream.send(StringValue(value=f"word{number}"))
                assert (await stream.receive()).value == f"WORD{number}"
            await stream.close_send()
            assert [reply async for reply in stream] == []
        assert (await stub.Echo(BytesValue(value=b"alive"))).value == b"alive"


async def test_our_client_has_many_in_flight(go_server: GoServer) -> None:
    found: set[int] = set()

    async def call(size: int) -> None:
        found.add(len((await stub.Echo(BytesValue(value=bytes(size)))).value))

    async with client_of(go_server[0]) as (_, stub), trio.open_nursery() as nursery:
        for size in range(0, 40_000, 100):
            nursery.start_soon(call, size)
    assert found == set(range(0, 40_000, 100))


async def test_a_request_over_the_limit_at_the_go_server(go_server: GoServer) -> None:
    """Sent in spite of the limit: both implementations fail that call only."""
    with trio.fail_after(30):
        stream = await trio.open_unix_socket(go_server[0])
        async with Client(stream, max_message=8 << 20) as client:
            stub = client.stub(ECHO)
            error = await failure(stub.Echo(BytesValue(value=bytes(5 << 20))))
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert (await stub.Echo(BytesValue(value=b"alive"))).value == b"alive"


async def test_the_go_server_dies(go_server: GoServer) -> None:
    errors: list[RpcError] = []

    async def call() -> None:
        errors.append(await failure(stub.Sleep(DoubleValue(value=60))))

    async with client_of(go_server[0]) as (client, stub):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call)
            await wait_all_tasks_blocked()
            await stub.Echo(BytesValue())
            go_server[1].kill()
            begin = trio.current_time()
        assert trio.current_time() - begin < 2
        await client.wait_closed()
    assert [type(error) for error in errors] == [ConnectionLost] * 10


async def test_answers_to_nonsense_agree(go_server: GoServer, tmp_path: Path) -> None:
    """Frames that are wrong, but not so that the connection is lost: the same codes."""
    frames = [
        (2, 1, b""),  # an even stream id
        (5, 1, b"\xff"),  # not a request
        (3, 1, b""),  # an id that doesn't grow
        (99, 3, b""),  # a message of no stream
        (101, 1, b""),  # no service
    ]
    answers = []
    async with our_server(tmp_path) as path:
        for socket in (go_server[0], path):
            with trio.fail_after(20):
                answers.append(await _codes(socket, frames))
    assert answers[0] == answers[1]
    assert [code for _, code in answers[0]] == [Code.INVALID_ARGUMENT] * 4 + [Code.UNIMPLEMENTED]


async def _codes(path: str, frames: list[tuple[int, int, bytes]]) -> list[tuple[int, int]]:
    codes = []
    async with await trio.open_unix_socket(path) as stream:
        for stream_id, kind, data in frames:
            header = len(data).to_bytes(4) + stream_id.to_bytes(4) + bytes((kind, 0))
            await stream.send_all(header + data)
            # The answer may be to any id: a client with every one of them in flight reads it.
            reader = Connection(Role.CLIENT)
            reader._active[stream_id] = 0
            events: list[Any] = []
            while not events:
                events = reader.receive_data(await stream.receive_some())
            assert isinstance(events[0], ResponseReceived)
            codes.append((events[0].stream_id, events[0].code))
    return codes


@asynccontextmanager
async def our_server(directory: Path) -> AsyncIterator[str]:
    path = str(directory / "ours")
    server = Server()
    server.register(ECHO, Echo())
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_listeners, [trio.SocketListener(listener)])
            yield path
            await server.shutdown(5)


async def test_the_go_client_at_our_server(tmp_path: Path) -> None:
    """Unary, streams, limits, deadlines, metadata, statuses; one connection for all."""
    async with our_server(tmp_path) as path:
        with trio.fail_after(90):
            done = await trio.run_process(
                [*go_peer(), "check", path], capture_stdout=True, capture_stderr=True
            )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 15
    assert [result for result in results if result["error"]] == []
