# SPDX-License-Identifier: Apache-2.0
"""What a peer that doesn't read, or floods, can make this end hold."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue

from ttrpc.client import Client
from ttrpc.errors import Code, RpcError
from ttrpc.protocol import Connection, Role
from ttrpc.server import Server
from ttrpc.tests.conftest import make_pair, socket_streams
from ttrpc.tests.echo import ECHO, Echo
from ttrpc.transport import HIGH_WATER, INBOX_MESSAGES, Transport

MIB = 1 << 20


def backlog_of(server: Server) -> int:
    (connection,) = server._connections
    return connection._transport.backlog


async def test_a_client_that_does_not_read_stops_the_server() -> None:
    at_server, at_client = socket_streams()
    server, echo = Server(), Echo()
    server.register(ECHO, echo)
    client = Connection(Role.CLIENT)
    sent = 0
    payload = BytesValue(value=bytes(MIB)).SerializeToString()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            # Echoes are asked for until the server doesn't take more; none is read.
            while True:
                client.send_request("pykata.test.Echo", "Echo", payload)
                with trio.move_on_after(1) as scope:
                    await at_client.send_all(client.data_to_send())
                if scope.cancelled_caught:
                    break
                sent += 1
                assert backlog_of(server) <= HIGH_WATER + 4 * MIB
            assert sent < 20
            await at_client.aclose()
    assert not server._connections


async def test_small_requests_for_large_answers() -> None:
    at_server, at_client = socket_streams()
    server, echo = Server(), Echo()
    made = 0

    async def make(request: Int64Value, context: object) -> BytesValue:
        nonlocal made
        made += 1
        return BytesValue(value=bytes(request.value))

    echo.Make = make  # type: ignore[method-assign]
    server.register(ECHO, echo)
    client = Connection(Role.CLIENT)
    for _ in range(1000):
        client.send_request("pykata.test.Echo", "Make", Int64Value(value=MIB).SerializeToString())
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            await at_client.send_all(client.data_to_send())
            await trio.testing.wait_all_tasks_blocked(0.2)
            assert backlog_of(server) <= HIGH_WATER + 2 * MIB
            assert made <= 10
            answers = 0
            while answers < 100:
                answers += len(client.receive_data(await at_client.receive_some(MIB)))
            assert made <= 100 + 10
            await at_client.aclose()


async def test_a_client_that_does_not_read_its_stream_stops_that_stream() -> None:
    at_server, at_client = socket_streams()
    server, echo = Server(), Echo()
    sent = 0

    async def flood(request: object, context: object) -> None:
        nonlocal sent
        while True:
            await context.send(StringValue(value="x" * MIB))  # type: ignore[attr-defined]
            sent += 1

    echo.Count = flood  # type: ignore[method-assign, assignment]
    server.register(ECHO, echo)
    client = Connection(Role.CLIENT)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            client.send_request("pykata.test.Echo", "Count", b"", streaming=True)
            await at_client.send_all(client.data_to_send())
            before = -1
            while sent != before or sent == 0:
                before = sent
                await trio.testing.wait_all_tasks_blocked(0.2)
            assert backlog_of(server) <= HIGH_WATER + 2 * MIB
            assert sent < 20
            # Who reads again gets more.
            while sent == before:
                await at_client.receive_some(MIB)
            await at_client.aclose()


async def test_a_stream_that_is_not_taken_fails_alone() -> None:
    """The reader of a connection waits for a stream's user, but not for ever."""
    async with make_pair(*socket_streams()) as pair:
        async with pair.stub.Count(Int64Value(value=50_000)) as stream:
            (inbox,) = pair.client._inboxes.values()
            # Other calls come through though nobody takes the messages of this stream.
            while inbox._error is None:
                assert (await pair.stub.Echo(BytesValue(value=b"x"))).value == b"x"
            # What was read at once with the message that was one too many is kept.
            assert len(inbox._messages) < INBOX_MESSAGES + (64 << 10) // 10
            with pytest.raises(RpcError) as caught:
                async for _ in stream:
                    pass
            assert caught.value.code is Code.RESOURCE_EXHAUSTED
        assert (await pair.stub.Echo(BytesValue(value=b"y"))).value == b"y"


async def test_a_method_that_does_not_take_its_messages_fails_alone() -> None:
    at_server, at_client = socket_streams()
    server, echo = Server(), Echo()
    failed: list[RpcError] = []
    stuck = trio.Event()

    async def lazy(messages: object, context: object) -> Int64Value:
        await stuck.wait()
        try:
            async for _ in messages:  # type: ignore[attr-defined]
                pass
        except RpcError as error:
            failed.append(error)
            raise
        return Int64Value()

    echo.Sum = lazy  # type: ignore[method-assign, assignment]
    server.register(ECHO, echo)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            async with Client(at_client) as client:
                stub = client.stub(ECHO)
                async with stub.Sum() as stream:
                    for _ in range(3 * INBOX_MESSAGES):
                        await stream.send(Int64Value(value=1))
                    assert (await stub.Echo(BytesValue(value=b"x"))).value == b"x"
                    stuck.set()
                    with pytest.raises(RpcError) as caught:
                        await stream.receive()
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert len(failed) == 1


async def test_a_server_that_does_not_read_bounds_the_client() -> None:
    """Calls to it wait, and their deadlines hold."""
    at_server, at_client = socket_streams()
    failures: list[RpcError] = []

    async def call() -> None:
        with pytest.raises(RpcError) as caught:
            await client.stub(ECHO).Echo(BytesValue(value=bytes(MIB)), timeout=1)
        failures.append(caught.value)

    with trio.fail_after(20):
        async with Client(at_client) as client, trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert client._transport.backlog <= HIGH_WATER + 2 * MIB
    assert [error.code for error in failures] == [Code.DEADLINE_EXCEEDED] * 50
    await at_server.aclose()


async def test_too_many_calls_in_flight() -> None:
    async with make_pair(*socket_streams(), max_streams=5) as pair:
        results: list[Code] = []

        async def call() -> None:
            try:
                await pair.stub.Sleep(Int64Value(), timeout=1)
            except RpcError as error:
                results.append(error.code)

        pair.echo.Sleep = None  # type: ignore[method-assign, assignment]

        async def wait(request: object, context: object) -> None:
            await trio.sleep_forever()

        pair.server._services[ECHO.full_name]["Sleep"].function = wait
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call)
        assert sorted(results) == [Code.DEADLINE_EXCEEDED] * 5 + [Code.RESOURCE_EXHAUSTED] * 3


async def test_answers_are_read_though_the_peer_left() -> None:
    """A server that answers and closes at once: the answer counts."""
    at_server, at_client = socket_streams()
    server = Connection(Role.SERVER)

    async def answer_and_leave() -> None:
        (request,) = server.receive_data(await at_server.receive_some())
        server.send_response(request.stream_id, BytesValue(value=b"bye").SerializeToString())
        await at_server.send_all(server.data_to_send())
        await at_server.aclose()

    with trio.fail_after(10):
        async with Client(at_client) as client, trio.open_nursery() as nursery:
            nursery.start_soon(answer_and_leave)
            assert (await client.stub(ECHO).Echo(BytesValue())).value == b"bye"


async def test_frames_are_sent_together() -> None:
    """Of many calls in one pass of the scheduler: few system calls."""
    sent: list[bytes] = []

    class Stream(trio.abc.Stream):
        async def send_all(self, data: bytes) -> None:
            sent.append(bytes(data))
            await trio.lowlevel.checkpoint()

        async def wait_send_all_might_not_block(self) -> None: ...

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.sleep_forever()

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    connection = Connection(Role.CLIENT)
    transport = Transport(Stream(), connection, lambda reason: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(16):
            connection.send_request("s", "m", b"")
            transport.flush(now=False)
        await transport.wait_sent()
        nursery.cancel_scope.cancel()
    assert len(sent) == 1
    assert transport.backlog == 0


async def test_a_cancelled_call_is_not_sent() -> None:
    at_server, at_client = socket_streams()
    with trio.fail_after(10):
        async with Client(at_client) as client:
            with trio.CancelScope() as scope:
                scope.cancel()
                await client.stub(ECHO).Echo(BytesValue())
            assert client._connection.in_flight == 0
        assert await at_server.receive_some() == b""
    await at_server.aclose()


async def test_calls_that_wait_and_calls_that_do_not_in_any_order() -> None:
    """A call that waits keeps the task that read its request: reading has to go on."""
    async with make_pair(*socket_streams()) as pair:
        order: list[str] = []
        release = trio.Event()

        async def wait(request: StringValue, context: object) -> StringValue:
            with trio.move_on_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(release.wait)
            return request

        pair.server._services[ECHO.full_name]["Sleep"].function = wait

        async def call(number: int) -> None:
            if number % 3:
                await pair.stub.Echo(BytesValue(value=b"x"))
                order.append("echo")
            else:
                await pair.stub.Sleep(StringValue(value="slow"), timeout=number % 2 * 20 or None)
                order.append("wait")

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(call, number)
            while len(order) < 40:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert set(order) == {"echo"}
            release.set()
        assert order[40:] == ["wait"] * 20
