# SPDX-License-Identifier: Apache-2.0
"""A ttrpc server over any trio stream."""

from __future__ import annotations

import logging
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Sequence,
)
from functools import partial
from types import coroutine
from typing import TYPE_CHECKING, Any

import trio
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from ttrpc.errors import Code, ProtocolError, RpcError
from ttrpc.protocol import (
    MAX_MESSAGE,
    MAX_REQUEST_BYTES,
    MAX_STREAMS,
    Connection,
    Event,
    MessageReceived,
    RequestReceived,
    Role,
    StreamFailed,
)
from ttrpc.transport import HIGH_WATER, Inbox, Transport

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message

log = logging.getLogger(__name__)

_LAST_WRITE = 1.0
"""Seconds for a peer to take the last answers when its connection is closed."""


class Context:
    """What a call carries besides its request.

    Attributes:
        metadata: values by lower-cased key.
        deadline: on trio's clock (trio.current_time()); math.inf: none. Enforced: the
            implementation is cancelled when it passes.
    """

    __slots__ = ("_reply", "deadline", "metadata")

    def __init__(
        self,
        metadata: dict[str, list[str]],
        deadline: float,
        reply: Callable[[Message], Awaitable[None]] | None,
    ) -> None:
        self.metadata = metadata
        self.deadline = deadline
        self._reply = reply

    async def send(self, message: Message) -> None:
        """Send one message of a method that streams to the client; waits for a slow reader.

        Raises:
            RpcError: RESOURCE_EXHAUSTED, the message is over the limit.
            RuntimeError: the method doesn't stream to the client.
        """
        if self._reply is None:
            raise RuntimeError("the method does not stream to the client")
        await self._reply(message)


class Messages:
    """The messages of a client that streams: `async for message in messages`, or receive()."""

    def __init__(self, inbox: Inbox, kind: type[Message]) -> None:
        self._inbox = inbox
        self._kind = kind

    async def receive(self) -> Any:
        """The next message.

        Raises:
            trio.EndOfChannel: the client has ended its side.
            RpcError: INVALID_ARGUMENT, it can't be decoded.
        """
        payload = await self._inbox.get()
        if payload is None:
            raise trio.EndOfChannel
        return _parse(self._kind, payload)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        payload = await self._inbox.get()
        if payload is None:
            raise StopAsyncIteration
        return _parse(self._kind, payload)


class _Method:
    """A method of an implementation, looked up once."""

    __slots__ = ("function", "kind", "name", "streaming", "takes_stream", "unary")

    def __init__(self, method: MethodDescriptor, function: Callable[..., Awaitable[Any]]) -> None:
        self.name = f"{method.containing_service.full_name}/{method.name}"
        self.function = function
        self.kind = GetMessageClass(method.input_type)
        self.takes_stream = method.client_streaming
        self.streaming = method.server_streaming
        self.unary = not (method.client_streaming or method.server_streaming)


class Server:
    """Serves implementations of protobuf services on any number of connections.

    Args:
        max_message: limit of a message in bytes, both ways.
        max_streams: calls in flight per connection; further ones are RESOURCE_EXHAUSTED.
        max_request_bytes: bytes of requests in flight per connection; likewise.
    """

    def __init__(
        self,
        *,
        max_message: int = MAX_MESSAGE,
        max_streams: int = MAX_STREAMS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._new_connection = partial(
            Connection,
            Role.SERVER,
            max_message=max_message,
            max_streams=max_streams,
            max_request_bytes=max_request_bytes,
        )
        self._services: dict[str, dict[str, _Method]] = {}
        self._connections: set[_ServerConnection] = set()
        self._accepting: set[trio.CancelScope] = set()
        self._draining = False
        self._left = trio.lowlevel.ParkingLot()

    def register(self, service: ServiceDescriptor, implementation: object) -> None:
        """Serve a service.

        Args:
            implementation: has a coroutine function for each method, named like it:
                `async def Name(request, context) -> reply`. With a stream from the client the
                first argument is a Messages; with one to the client, it calls context.send()
                and returns None. A method that is missing answers UNIMPLEMENTED. An RpcError
                that it raises is the answer; another exception is logged and answers UNKNOWN.

        Raises:
            ValueError: a service of that name is registered already.
        """
        if service.full_name in self._services:
            raise ValueError(f"service {service.full_name} is registered already")
        methods: dict[str, _Method] = {}
        for method in service.methods:
            function = getattr(implementation, method.name, None)
            if function is not None:
                methods[method.name] = _Method(method, function)
        self._services[service.full_name] = methods

    async def serve_listeners(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept connections and serve them until shutdown() is over; closes the listeners."""
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as accepting:
                if self._draining:
                    accepting.cancel()
                self._accepting.add(accepting)
                try:
                    async with trio.open_nursery() as acceptors:
                        await acceptors.start(self._accept, listeners, nursery)
                        task_status.started()
                finally:
                    self._accepting.discard(accepting)

    async def _accept(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
        nursery: trio.Nursery,
        *,
        task_status: trio.TaskStatus[Any],
    ) -> None:
        await trio.serve_listeners(
            self.serve_stream, list(listeners), handler_nursery=nursery, task_status=task_status
        )

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until it ends or shutdown(); closes the stream.

        Whatever the peer does ends this connection at the most: nothing is raised.
        """
        connection = _ServerConnection(stream, self._new_connection(), self._services)
        if self._draining:
            await trio.aclose_forcefully(stream)
            return
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._left.unpark_all()

    async def shutdown(self, grace: float, *, linger: float = 0.0) -> None:
        """Accept nothing more, let the calls in flight end, close the connections.

        New calls on open connections answer UNAVAILABLE. Not to be awaited by a method's
        implementation, whose own call is one of those in flight.

        Args:
            grace: seconds after which the calls still in flight are cancelled.
            linger: seconds of `grace` in which a peer may close first, once it has its last
                answer. Go's client takes an end that comes right behind an answer for a failure
                of that call, every now and then.
        """
        self._draining = True
        for scope in self._accepting:
            scope.cancel()
        for connection in self._connections:
            connection.drain(linger)
        with trio.move_on_after(grace):
            while self._connections:
                await self._left.park()
        for connection in self._connections:
            connection.stop()
        while self._connections:
            await self._left.park()
        await trio.lowlevel.checkpoint()


class _ServerConnection:
    """One connection: its reader dispatches, calls run in tasks of its nursery."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        connection: Connection,
        services: dict[str, dict[str, _Method]],
    ) -> None:
        self._connection = connection
        self._services = services
        self._transport = Transport(stream, connection, self._cannot_write)
        # Of the calls in flight, those of methods that stream, and all that can be cancelled.
        self._inboxes: dict[int, Inbox] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._draining = False
        self._linger = 0.0
        self._drained = trio.Event()
        # What the reader has yet to handle, and whether it is at it (and will flush then).
        self._events: Iterator[Event] = iter(())
        self._dispatching = False
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._transport.run)
                    nursery.start_soon(self._close_when_drained)
                    nursery.start_soon(self._read)
            finally:
                await self._transport.aclose()

    def stop(self) -> None:
        """Cancel the calls in flight and close."""
        self._scope.cancel()

    def _cannot_write(self, reason: str) -> None:
        log.debug("%s", reason)
        self._scope.cancel()

    def drain(self, linger: float) -> None:
        """Refuse new calls, and close once none is in flight, `linger` seconds after the last."""
        self._draining = True
        self._linger = linger
        if not self._connection.in_flight:
            self._drained.set()

    async def _close_when_drained(self) -> None:
        await self._drained.wait()
        with trio.move_on_after(_LAST_WRITE):
            await self._transport.wait_sent()
        await trio.sleep(self._linger)  # the reader ends all when the peer closes
        self.stop()

    async def _read(self) -> None:
        """Read and dispatch until the connection ends, or a call that was run in here blocks.

        Most calls end without ever waiting, so they aren't worth a task of their own. One that
        does wait keeps this task, and another one takes the reading over.
        """
        try:
            while True:
                if await self._dispatch_all():
                    return
                self._transport.flush(now=True)
                if self._inboxes:
                    await self._wait_for_readers()
                data = await self._transport.receive()
                if not data:
                    break
                self._events = iter(self._connection.receive_data(data))
        except ProtocolError as error:
            log.warning("a peer broke the protocol: %s", error)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("a connection broke: %s", error)
        self._scope.cancel()

    async def _dispatch_all(self) -> bool:
        """Handle the events that came. True: another task reads now, end this one."""
        self._dispatching = True
        for event in self._events:
            if self._transport.backlog > HIGH_WATER:
                # A few small requests can ask for gigabytes: their calls begin one by one.
                self._dispatching = False
                self._transport.flush(now=False)
                await self._transport.wait_room()
                self._dispatching = True
            if type(event) is RequestReceived:
                call = self._accept(event)
                if call is not None and await _run_here(call, self._hand_over):
                    return True
            elif type(event) is MessageReceived:
                inbox = self._inboxes.get(event.stream_id)
                if inbox is not None:
                    inbox.put(event.payload, event.end)
            elif isinstance(event, StreamFailed):
                scope = self._scopes.get(event.stream_id)
                if scope is not None:
                    scope.cancel()
        self._dispatching = False
        return False

    def _hand_over(self) -> None:
        self._dispatching = False
        self._nursery.start_soon(self._read)

    async def _wait_for_readers(self) -> None:
        for inbox in list(self._inboxes.values()):
            if inbox.full and not await inbox.wait_room():
                text = "the stream's messages were not taken in time"
                inbox.fail(RpcError(Code.RESOURCE_EXHAUSTED, text))

    def _accept(self, event: RequestReceived) -> Coroutine[Any, Any, None] | None:
        """What has to run for a request; None if it was refused."""
        methods = self._services.get(event.service)
        method = methods.get(event.method) if methods else None
        if method is None:
            what = "service" if methods is None else "method"
            name = event.service if methods is None else event.method
            self._refuse(event, Code.UNIMPLEMENTED, f"unknown {what} {name}")
        elif self._draining:
            self._refuse(event, Code.UNAVAILABLE, "the server is shutting down")
        elif event.timeout_nano < 0:
            self._refuse(event, Code.DEADLINE_EXCEEDED, "the deadline was over on arrival")
        elif method.unary and not event.timeout_nano:
            return self._call(method, event, math.inf)
        else:
            return self._prepare(method, event)
        return None

    def _refuse(self, event: RequestReceived, code: Code, message: str) -> None:
        self._connection.send_response(event.stream_id, b"", code, message)

    def _prepare(self, method: _Method, event: RequestReceived) -> Coroutine[Any, Any, None]:
        deadline = math.inf
        if event.timeout_nano:
            deadline = trio.current_time() + event.timeout_nano / 1e9
        self._scopes[event.stream_id] = trio.CancelScope(deadline=deadline)
        if method.takes_stream:
            inbox = self._inboxes[event.stream_id] = Inbox()
            # Of an open stream an empty first payload is none, as with the Go implementation.
            first = event.payload if event.payload or not event.more else None
            inbox.put(first, not event.more)
        return self._call_in_scope(method, event, deadline)

    async def _call_in_scope(
        self, method: _Method, event: RequestReceived, deadline: float
    ) -> None:
        stream_id = event.stream_id
        try:
            with self._scopes[stream_id] as scope:
                await self._call(method, event, deadline)
            if scope.cancelled_caught:
                # A stream that the protocol refused has its answer; then this does nothing.
                text = f"{method.name} did not end before its deadline"
                self._answer(stream_id, b"", Code.DEADLINE_EXCEEDED, text)
        finally:
            del self._scopes[stream_id]
            self._inboxes.pop(stream_id, None)

    async def _call(self, method: _Method, event: RequestReceived, deadline: float) -> None:
        stream_id = event.stream_id
        metadata: dict[str, list[str]] = {}
        for key, value in event.metadata:
            metadata.setdefault(key.lower(), []).append(value)
        reply = partial(self._send_message, stream_id) if method.streaming else None
        context = Context(metadata, deadline, reply)
        try:
            if method.takes_stream:
                request: Any = Messages(self._inboxes[stream_id], method.kind)
            else:
                request = _parse(method.kind, event.payload)
            result = await method.function(request, context)
            payload = b"" if method.streaming else result.SerializeToString()
            if self._transport.backlog > HIGH_WATER:
                await self._transport.wait_room()
        except Exception as error:
            while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            if isinstance(error, RpcError):
                self._answer(stream_id, b"", error.code, error.message, error.details)
            else:
                log.error("%s failed", method.name, exc_info=error)
                self._answer(stream_id, b"", Code.UNKNOWN, str(error) or type(error).__name__)
        else:
            if method.streaming:
                self._connection.close_send(stream_id)
                self._sent()
            else:
                self._answer(stream_id, payload)

    def _answer(
        self,
        stream_id: int,
        payload: bytes,
        code: int = 0,
        message: str = "",
        details: Sequence[Any] = (),
    ) -> None:
        self._connection.send_response(stream_id, payload, code, message, details)
        self._sent()

    def _sent(self) -> None:
        in_flight = self._connection.in_flight
        if not self._dispatching:
            self._transport.flush(now=not in_flight)
        if self._draining and not in_flight:
            self._drained.set()

    async def _send_message(self, stream_id: int, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        await self._transport.wait_room()
        self._connection.send_message(stream_id, message.SerializeToString())
        self._transport.flush(now=False)


@coroutine
def _run_here(
    call: Coroutine[Any, Any, None], on_block: Callable[[], None]
) -> Generator[Any, Any, bool]:
    """Await `call`, with on_block() called when it first waits for anything.

    What it yields goes to trio unseen, so it is as good as awaited by this task.

    Returns:
        whether it waited.
    """
    try:
        trap = call.send(None)
    except StopIteration:
        return False
    on_block()
    try:
        while True:
            try:
                value = yield trap
            except BaseException as error:
                trap = call.throw(error)
            else:
                trap = call.send(value)
    except StopIteration:
        return True


def _parse(kind: type[Message], payload: bytes) -> Any:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        text = f"the request is no {kind.DESCRIPTOR.full_name}"
        raise RpcError(Code.INVALID_ARGUMENT, text) from error
