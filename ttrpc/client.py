# SPDX-License-Identifier: Apache-2.0
"""A ttrpc client over any trio stream."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import outcome
import trio
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from ttrpc.errors import Code, ConnectionLost, ProtocolError, RpcError, code_of
from ttrpc.protocol import (
    MAX_MESSAGE,
    Connection,
    MessageReceived,
    ResponseReceived,
    Role,
)
from ttrpc.transport import HIGH_WATER, Inbox, Transport

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message

Metadata = Mapping[str, str | Sequence[str]]
"""Keys are lower-cased; a key may have several values."""

_CLOSED = "the client is closed"

_LAST_READ = 0.5
"""Seconds for what a peer that takes nothing any longer may still have to say."""


class _Call:
    """A unary call in flight: its task, once that waits, or else what ended it meanwhile."""

    __slots__ = ("result", "task")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.result: ResponseReceived | str | None = None

    def end(self, result: ResponseReceived | str) -> None:
        """Args: result: the response, or why there will be none."""
        task = self.task
        if task is None:
            self.result = result
        else:
            trio.lowlevel.reschedule(task, outcome.Value(result))


class Client:
    """The client's end of a connection.

    Use as an async context manager. When the peer is lost, every call in flight and every later
    one raises ConnectionLost; nothing else happens to the body.

    Args:
        stream: the connection; belongs to the client.
        max_message: limit of a message in bytes, both ways.

    Resource handling: owns a nursery with the tasks that read and write; on exit calls in flight
    (of other tasks) fail and the stream is closed.
    """

    def __init__(self, stream: trio.abc.Stream, *, max_message: int = MAX_MESSAGE) -> None:
        self._connection = Connection(Role.CLIENT, max_message=max_message)
        self._transport = Transport(stream, self._connection, self._cannot_write)
        self._calls: dict[int, _Call] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._stubs: dict[str, Stub] = {}
        self._lost: str | None = None
        self._closed = trio.Event()
        self._nursery_manager = trio.open_nursery()

    async def __aenter__(self) -> Client:
        self._nursery = await self._nursery_manager.__aenter__()
        self._nursery.start_soon(self._transport.run)
        self._nursery.start_soon(self._read)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lose(_CLOSED)
        # The reader closes the stream. The body's error is its own, not one of a group.
        self._nursery.cancel_scope.cancel()
        await self._nursery_manager.__aexit__(None, None, None)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, for whatever reason."""
        return self._lost is not None

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, for whatever reason."""
        await self._closed.wait()

    def stub(self, service: ServiceDescriptor) -> Stub:
        """The methods of a service, by name: unary ones are coroutine functions
        `await stub.Name(request, timeout=None, metadata=None)`, those that stream are
        `async with stub.Name(request, …) as stream` (see ClientStream)."""
        stub = self._stubs.get(service.full_name)
        if stub is None or stub._service is not service:
            stub = self._stubs[service.full_name] = Stub(self, service)
        return stub

    # Reading

    async def _read(self) -> None:
        try:
            reason = await self._read_until_end()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            reason = f"the connection broke: {error.__cause__ or error}"
        except ProtocolError as error:
            reason = f"the peer broke the protocol: {error}"
        except trio.Cancelled:
            await self._transport.aclose()
            raise
        self._lose(reason)
        await self._transport.aclose()

    async def _read_until_end(self) -> str:
        connection = self._connection
        calls = self._calls
        while True:
            data = await self._transport.receive()
            if not data:
                connection.receive_eof()
                return "the peer closed the connection"
            for event in connection.receive_data(data):
                if type(event) is ResponseReceived:
                    call = calls.pop(event.stream_id, None)
                    if call is not None:
                        call.end(event)
                    else:
                        self._end_stream(event)
                elif type(event) is MessageReceived:
                    inbox = self._inboxes.get(event.stream_id)
                    if inbox is not None:
                        inbox.put(event.payload, event.end)
            if self._inboxes:
                await self._wait_for_readers()

    def _end_stream(self, event: ResponseReceived) -> None:
        inbox = self._inboxes.get(event.stream_id)
        if inbox is None:
            return
        if event.code:
            inbox.fail(_error(event))
        else:
            inbox.put(event.payload, True)

    async def _wait_for_readers(self) -> None:
        for stream_id, inbox in list(self._inboxes.items()):
            if inbox.full and not await inbox.wait_room():
                self._connection.forget(stream_id)
                inbox.fail(RpcError(Code.RESOURCE_EXHAUSTED, "the stream was not read in time"))

    def _cannot_write(self, reason: str) -> None:
        if self._lost is None:
            self._nursery.start_soon(self._lose_after_reading, reason)

    async def _lose_after_reading(self, reason: str) -> None:
        """A peer that left may have answered before: let the reader come to the end first."""
        with trio.move_on_after(_LAST_READ):
            await self._closed.wait()
        self._lose(reason)

    def _lose(self, reason: str) -> None:
        """The connection has ended: end every call."""
        if self._lost is not None:
            return
        self._lost = reason
        self._connection.receive_eof()
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.end(reason)
        for inbox in self._inboxes.values():
            inbox.fail(ConnectionLost(reason))
        self._closed.set()

    # Calling

    async def _check_ready(self) -> None:
        if self._transport.backlog > HIGH_WATER:
            await self._transport.wait_room()
        if self._lost is not None:
            await trio.lowlevel.checkpoint()
            raise ConnectionLost(self._lost)

    async def _unary(
        self,
        service: str,
        method: str,
        payload: bytes,
        timeout_nano: int,
        metadata: Sequence[tuple[str, str]],
    ) -> ResponseReceived:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._lost is not None or self._transport.backlog > HIGH_WATER:
            await self._check_ready()
        calls = self._calls
        stream_id = self._connection.send_request(
            service, method, payload, timeout_nano=timeout_nano, metadata=metadata
        )
        call = calls[stream_id] = _Call()
        self._transport.flush(now=len(calls) == 1)
        result = call.result
        if result is None:
            call.task = trio.lowlevel.current_task()

            def abandon(_: Any) -> trio.lowlevel.Abort:
                calls.pop(stream_id, None)
                self._connection.forget(stream_id)
                return trio.lowlevel.Abort.SUCCEEDED

            result = await trio.lowlevel.wait_task_rescheduled(abandon)
        else:
            await trio.lowlevel.checkpoint()
        if type(result) is str:
            raise ConnectionLost(result)
        assert isinstance(result, ResponseReceived)
        return result

    def _open_stream(
        self,
        service: str,
        method: str,
        payload: bytes,
        timeout_nano: int,
        metadata: Sequence[tuple[str, str]],
        more: bool,
    ) -> tuple[int, Inbox]:
        stream_id = self._connection.send_request(
            service,
            method,
            payload,
            timeout_nano=timeout_nano,
            metadata=metadata,
            streaming=True,
            more=more,
        )
        inbox = self._inboxes[stream_id] = Inbox()
        self._transport.flush(now=not more)
        return stream_id, inbox

    def _abandon_stream(self, stream_id: int) -> None:
        # The protocol has no way to cancel, but an end of our messages may end the peer's work.
        self._connection.close_send(stream_id)
        self._connection.forget(stream_id)
        del self._inboxes[stream_id]
        self._transport.flush(now=True)


class ClientStream:
    """A call with a stream of messages in one direction or both.

    `async for reply in stream` takes the replies; receive() takes one. A call that streams only
    to the server is answered once: send(), close_send(), receive().
    """

    def __init__(
        self, client: Client, stream_id: int, inbox: Inbox, reply: type[Message], more: bool
    ) -> None:
        self._client = client
        self._id = stream_id
        self._inbox = inbox
        self._reply = reply
        self._more = more

    async def send(self, message: Message) -> None:
        """Send one message; waits while much is unsent.

        Raises:
            RpcError: what ended the call, or RESOURCE_EXHAUSTED: the message is too large.
            RuntimeError: after close_send(), or the method takes no messages.
        """
        if not self._more:
            raise RuntimeError("the sending side of the stream is closed")
        await trio.lowlevel.checkpoint()
        await self._client._check_ready()
        self._client._connection.send_message(self._id, message.SerializeToString())
        self._client._transport.flush(now=False)

    async def close_send(self) -> None:
        """Tell the server that no more messages come."""
        await trio.lowlevel.checkpoint()
        if self._more:
            self._more = False
            self._client._connection.close_send(self._id)
            self._client._transport.flush(now=True)

    async def receive(self) -> Any:
        """The next reply.

        Raises:
            trio.EndOfChannel: the server has ended the stream.
            RpcError: the call failed.
        """
        payload = await self._inbox.get()
        if payload is None:
            raise trio.EndOfChannel
        return _parse(self._reply, payload)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        payload = await self._inbox.get()
        if payload is None:
            raise StopAsyncIteration
        return _parse(self._reply, payload)


class Stub:
    """The methods of one service as attributes; made by Client.stub()."""

    def __init__(self, client: Client, service: ServiceDescriptor) -> None:
        self._client = client
        self._service = service

    def __getattr__(self, name: str) -> Any:
        method = self._service.methods_by_name.get(name)
        if method is None:
            raise AttributeError(f"service {self._service.full_name} has no method {name}")
        if method.client_streaming or method.server_streaming:
            bound = _bind_stream(self._client, method)
        else:
            bound = _bind_unary(self._client, method)
        self.__dict__[name] = bound
        return bound


def _bind_unary(client: Client, method: MethodDescriptor) -> Any:
    service, name = method.containing_service.full_name, method.name
    reply_class = GetMessageClass(method.output_type)

    async def call(
        request: Message, *, timeout: float | None = None, metadata: Metadata | None = None
    ) -> Any:
        pairs = _pairs(metadata) if metadata else ()
        payload = request.SerializeToString()
        if timeout is None:
            response = await client._unary(service, name, payload, 0, pairs)
        else:
            with trio.CancelScope(deadline=trio.current_time() + timeout) as scope:
                response = await client._unary(service, name, payload, _nanos(timeout), pairs)
            if scope.cancelled_caught:
                raise _too_late(name, timeout)
        if response.code:
            raise _error(response)
        return _parse(reply_class, response.payload)

    call.__name__ = name
    return call


def _bind_stream(client: Client, method: MethodDescriptor) -> Any:
    service, name = method.containing_service.full_name, method.name
    reply_class = GetMessageClass(method.output_type)
    more = method.client_streaming

    @asynccontextmanager
    async def call(
        request: Message | None = None,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> AsyncIterator[ClientStream]:
        if request is None and not more:
            raise TypeError(f"{name} takes a request")
        pairs = _pairs(metadata) if metadata else ()
        payload = b"" if request is None else request.SerializeToString()
        limit = math.inf if timeout is None else timeout
        with trio.CancelScope(deadline=trio.current_time() + limit) as scope:
            await trio.lowlevel.checkpoint()
            await client._check_ready()
            nanos = 0 if timeout is None else _nanos(timeout)
            stream_id, inbox = client._open_stream(service, name, payload, nanos, pairs, more)
            try:
                yield ClientStream(client, stream_id, inbox, reply_class, more)
            finally:
                client._abandon_stream(stream_id)
        if scope.cancelled_caught:
            raise _too_late(name, limit)

    call.__name__ = name
    return call


def _too_late(method: str, timeout: float) -> RpcError:
    return RpcError(Code.DEADLINE_EXCEEDED, f"{method} did not end within {timeout:g} s")


def _nanos(timeout: float) -> int:
    if timeout > 9e9:  # beyond 64 bits of nanoseconds: no limit
        return 0
    return max(int(timeout * 1e9), 1)


def _pairs(metadata: Metadata) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, values in metadata.items():
        if isinstance(values, str):
            pairs.append((key.lower(), values))
        else:
            pairs.extend((key.lower(), value) for value in values)
    return pairs


def _parse(kind: type[Message], payload: bytes) -> Any:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        text = f"the answer is no {kind.DESCRIPTOR.full_name}"
        raise RpcError(Code.INTERNAL, text) from error


def _error(response: ResponseReceived) -> RpcError:
    details: list[Any] = []
    if response.details:
        from google.protobuf.any_pb2 import Any as AnyMessage

        for data in response.details:
            try:
                details.append(AnyMessage.FromString(data))
            except DecodeError:
                continue
    return RpcError(code_of(response.code), response.message, details)
