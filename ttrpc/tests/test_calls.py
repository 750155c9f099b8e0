# SPDX-License-Identifier: Apache-2.0
"""Client and server together: calls, streams, limits, deadlines, cancellation, shutdown."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import trio
from google.protobuf.wrappers_pb2 import BytesValue, DoubleValue, Int64Value, StringValue

from ttrpc.client import Client
from ttrpc.errors import Code, ConnectionLost, RpcError
from ttrpc.protocol import MAX_MESSAGE
from ttrpc.server import Server
from ttrpc.tests.conftest import Pair, make_pair, socket_streams
from ttrpc.tests.echo import ECHO, Echo


async def alive(pair: Pair) -> None:
    """The connection still carries calls."""
    assert (await pair.stub.Echo(BytesValue(value=b"alive"))).value == b"alive"


async def failure(call: object) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_unary(pair: Pair) -> None:
    for size in (0, 1, 127, 128, 5000, 200_000, MAX_MESSAGE - 100):
        assert len((await pair.stub.Echo(BytesValue(value=bytes(size)))).value) == size


async def test_many_in_flight(pair: Pair) -> None:
    answers: dict[int, int] = {}

    async def call(size: int) -> None:
        answers[size] = len((await pair.stub.Echo(BytesValue(value=bytes(size)))).value)

    async with trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(call, number * 50)
    assert answers == {size: size for size in range(0, 15000, 50)}


async def test_status_with_details(pair: Pair) -> None:
    error = await failure(pair.stub.Fail(StringValue(value="no such thing")))
    assert (error.code, error.message) == (Code.NOT_FOUND, "no such thing")
    text = StringValue()
    assert [detail.Unpack(text) for detail in error.details] == [True]
    assert text.value == "a detail"
    await alive(pair)


async def test_exceptions_of_an_implementation(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: object, context: object) -> None:
        raise KeyError("of the implementation")

    async def in_a_nursery(request: object, context: object) -> None:
        async def fail() -> None:
            raise RpcError(Code.ABORTED, "in a child")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)

    pair.server._services[ECHO.full_name]["Echo"].function = broken
    error = await failure(pair.stub.Echo(BytesValue()))
    assert (error.code, error.message) == (Code.UNKNOWN, "'of the implementation'")
    assert "pykata.test.Echo/Echo failed" in caplog.text
    pair.server._services[ECHO.full_name]["Echo"].function = in_a_nursery
    assert (await failure(pair.stub.Echo(BytesValue()))).code is Code.ABORTED


async def test_unknown_service_and_method(pair: Pair) -> None:
    error = await failure(pair.stub.Missing(StringValue()))
    assert error.code is Code.UNIMPLEMENTED
    assert "Missing" in error.message
    pair.server._services.clear()
    assert (await failure(pair.stub.Echo(BytesValue()))).code is Code.UNIMPLEMENTED
    with pytest.raises(AttributeError, match="Nonesuch"):
        _ = pair.stub.Nonesuch


async def test_undecodable_request_and_answer(pair: Pair) -> None:
    # A bytes field whose length reaches beyond the message.
    raw = await pair.client._unary("pykata.test.Echo", "Echo", b"\x0a\x7f", 0, ())
    assert raw.code == Code.INVALID_ARGUMENT

    class Junk:
        def SerializeToString(self) -> bytes:
            return b"\x0a\x7f"

    async def junk(request: object, context: object) -> Junk:
        return Junk()

    pair.server._services[ECHO.full_name]["Echo"].function = junk
    assert (await failure(pair.stub.Echo(BytesValue()))).code is Code.INTERNAL


async def test_metadata(pair: Pair) -> None:
    metadata = {"Key": ["one", "two"], "other": "three"}
    ask = partial(pair.stub.Metadata, metadata=metadata)
    assert (await ask(StringValue(value="key"))).value == "one,two"
    assert (await ask(StringValue(value="other"))).value == "three"
    assert (await ask(StringValue(value="none"))).value == ""


async def test_limits(pair: Pair) -> None:
    error = await failure(pair.stub.Echo(BytesValue(value=bytes(MAX_MESSAGE))))
    assert error.code is Code.RESOURCE_EXHAUSTED
    error = await failure(pair.stub.Make(Int64Value(value=MAX_MESSAGE)))
    assert error.code is Code.RESOURCE_EXHAUSTED
    # The most that fits: tag and length of the field, of the payload in the frame: 5 bytes each.
    size = MAX_MESSAGE - 10
    assert len((await pair.stub.Make(Int64Value(value=size))).value) == size
    await alive(pair)


async def test_oversized_answer_on_the_wire() -> None:
    """From a peer that doesn't keep to the limit; only that call fails."""
    async with make_pair(*socket_streams(), max_message=16 << 20 - 1) as pair:
        assert (await failure(pair.stub.Make(Int64Value(value=5 << 20)))).code is (
            Code.RESOURCE_EXHAUSTED
        )
        await alive(pair)


async def test_oversized_request_on_the_wire() -> None:
    at_server, at_client = socket_streams()
    server = Server()
    server.register(ECHO, Echo())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, at_server)
        async with Client(at_client, max_message=12 << 20) as client:
            echo = client.stub(ECHO).Echo
            with trio.fail_after(10):
                error = await failure(echo(BytesValue(value=bytes(5 << 20))))
                assert error.code is Code.RESOURCE_EXHAUSTED
                assert (await echo(BytesValue(value=b"x"))).value == b"x"


async def test_client_stream(pair: Pair) -> None:
    async with pair.stub.Sum() as stream:
        for number in range(3000):
            await stream.send(Int64Value(value=number))
        await stream.close_send()
        assert (await stream.receive()).value == 3000 * 2999 // 2
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        with pytest.raises(RuntimeError):
            await stream.send(Int64Value())
    async with pair.stub.Sum() as stream:
        await stream.close_send()
        assert (await stream.receive()).value == 0


async def test_server_stream(pair: Pair) -> None:
    async with pair.stub.Count(Int64Value(value=3000)) as stream:
        assert [reply.value async for reply in stream] == list(range(3000))
    async with pair.stub.Count(Int64Value(value=0)) as stream:
        assert [reply async for reply in stream] == []
    async with pair.stub.Count(Int64Value(value=-1)) as stream:
        assert (await failure(stream.receive())).code is Code.OUT_OF_RANGE
    await alive(pair)


async def test_both_stream(pair: Pair) -> None:
    async with pair.stub.Chat() as stream:
        for number in range(100):
            await stream.send(StringValue(value=f"word{number}"))
            assert (await stream.receive()).value == f"WORD{number}"
        await stream.close_send()
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
    assert pair.client._connection.in_flight == 0
    assert not pair.client._inboxes


async def test_an_abandoned_stream_harms_nothing(pair: Pair) -> None:
    async with pair.stub.Count(Int64Value(value=3000)) as stream:
        assert (await stream.receive()).value == 0
    async with pair.stub.Chat() as stream:
        await stream.send(StringValue(value="x"))
    await alive(pair)


async def test_deadline_reaches_the_server(pair: Pair) -> None:
    seen = (await pair.stub.Deadline(StringValue(), timeout=20)).value
    assert 10 < seen <= 20
    assert (await pair.stub.Deadline(StringValue())).value == float("inf")


async def test_deadline_ends_both_ends(pair: Pair) -> None:
    error = await failure(pair.stub.Sleep(DoubleValue(value=60), timeout=0.05))
    assert error.code is Code.DEADLINE_EXCEEDED
    await pair.echo.cancelled_event.wait()
    assert pair.client._connection.in_flight == 0
    await alive(pair)


async def test_server_enforces_the_deadline_by_itself(pair: Pair) -> None:
    nanos = 50_000_000
    payload = DoubleValue(value=60).SerializeToString()
    raw = await pair.client._unary("pykata.test.Echo", "Sleep", payload, nanos, ())
    assert raw.code == Code.DEADLINE_EXCEEDED
    raw = await pair.client._unary("pykata.test.Echo", "Sleep", payload, -1, ())
    assert raw.code == Code.DEADLINE_EXCEEDED


async def test_deadline_of_a_stream(pair: Pair) -> None:
    with pytest.raises(RpcError) as caught:
        async with pair.stub.Chat(timeout=0.05) as stream:
            await stream.receive()
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await alive(pair)


async def test_cancelling_a_call_abandons_it(pair: Pair) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.stub.Sleep, DoubleValue(value=60))
            await pair.echo.started.wait()
            scope.cancel()
    assert pair.client._connection.in_flight == 0
    assert not pair.client._calls
    await alive(pair)


async def test_server_gone(pair: Pair) -> None:
    errors: list[RpcError] = []

    async def call() -> None:
        errors.append(await failure(pair.stub.Sleep(DoubleValue(value=60))))

    async def stream() -> None:
        async with pair.stub.Chat() as chat:
            errors.append(await failure(chat.receive()))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(call)
            nursery.start_soon(stream)
        await pair.echo.started.wait()
        await trio.testing.wait_all_tasks_blocked()
        begin = trio.current_time()
        await pair.server.shutdown(0)
    assert trio.current_time() - begin < 1
    assert len(errors) == 40
    assert {(type(error), error.code) for error in errors} == {(ConnectionLost, Code.UNAVAILABLE)}
    with trio.fail_after(1):
        await pair.client.wait_closed()
    assert pair.client.closed
    assert isinstance(await failure(pair.stub.Echo(BytesValue())), ConnectionLost)


async def test_client_gone_cancels_its_calls() -> None:
    at_server, at_client = socket_streams()
    server, echo = Server(), Echo()
    server.register(ECHO, echo)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            async with Client(at_client) as client:
                nursery.start_soon(_ignore, client.stub(ECHO).Sleep(DoubleValue(value=60)))
                await echo.started.wait()
            await echo.cancelled_event.wait()
    assert echo.cancelled == 1


async def _ignore(call: object) -> None:
    assert isinstance(await failure(call), ConnectionLost)


async def test_an_error_in_the_body_comes_out_as_it_is() -> None:
    _, at_client = socket_streams()
    with pytest.raises(KeyError):
        async with Client(at_client):
            raise KeyError


async def test_shutdown_drains(pair: Pair) -> None:
    answers: list[str] = []

    async def call() -> None:
        answers.append((await pair.stub.Sleep(DoubleValue(value=0.3))).value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await pair.echo.started.wait()
        nursery.start_soon(pair.server.shutdown, 20)
        await trio.testing.wait_all_tasks_blocked()
        error = await failure(pair.stub.Echo(BytesValue()))
        assert error.code is Code.UNAVAILABLE
        assert not isinstance(error, ConnectionLost)
    assert answers == ["slept"]
    await pair.client.wait_closed()


async def test_shutdown_lets_the_peer_close_first() -> None:
    at_server, at_client = socket_streams()
    server = Server()
    server.register(ECHO, Echo())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, at_server)
            async with Client(at_client) as client:
                await client.stub(ECHO).Echo(BytesValue())
                nursery.start_soon(partial(server.shutdown, 60, linger=60))
                await trio.testing.wait_all_tasks_blocked()
                error = await failure(client.stub(ECHO).Echo(BytesValue()))
                assert error.code is Code.UNAVAILABLE
                assert not isinstance(error, ConnectionLost), "it still answers"


async def test_shutdown_does_not_wait_for_a_peer_that_stays(pair: Pair) -> None:
    with trio.fail_after(10):
        await pair.server.shutdown(30, linger=0.05)
        await pair.client.wait_closed()


async def test_shutdown_ends_what_does_not_end(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_ignore, pair.stub.Sleep(DoubleValue(value=60)))
        await pair.echo.started.wait()
        await pair.server.shutdown(0.05)
    assert pair.echo.cancelled == 1


async def test_listeners(tmp_path: object) -> None:
    path = f"{tmp_path}/s"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(path)
    listener.listen()
    server = Server()
    server.register(ECHO, Echo())
    with pytest.raises(ValueError, match="registered"):
        server.register(ECHO, Echo())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_listeners, [trio.SocketListener(listener)])
            for _ in range(3):
                async with Client(await trio.open_unix_socket(path)) as client:
                    await client.stub(ECHO).Echo(BytesValue())
            async with Client(await trio.open_unix_socket(path)) as client:
                await client.stub(ECHO).Echo(BytesValue())
                await server.shutdown(5)  # serve_listeners returns, and so the nursery ends
                await client.wait_closed()
    with pytest.raises(OSError, match="refused"):
        await trio.open_unix_socket(path)


async def test_malformed_frame_closes_that_connection_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    server = Server()
    server.register(ECHO, Echo())
    good_server, good = socket_streams()
    bad_server, bad = socket_streams()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, good_server)
            nursery.start_soon(server.serve_stream, bad_server)
            async with Client(good) as client:
                await bad.send_all(b"GET / HTTP/1.1\r\n\r\n")
                assert await bad.receive_some() == b""
                assert (await client.stub(ECHO).Echo(BytesValue(value=b"1"))).value == b"1"
    assert "broke the protocol" in caplog.text


async def test_client_of_a_server_that_talks_nonsense() -> None:
    at_server, at_client = socket_streams()
    with trio.fail_after(10):
        async with Client(at_client) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ignore, client.stub(ECHO).Echo(BytesValue()))
                await at_server.receive_some()
                await at_server.send_all(b"\x00\x00\x00\x00\x00\x00\x00\x01\x09\x00")
            assert "protocol" in (await failure(client.stub(ECHO).Echo(BytesValue()))).message
    await at_server.aclose()
