# SPDX-License-Identifier: Apache-2.0
"""The ttrpc protocol as a state machine without I/O: bytes in, events out.

A frame is a 10-byte header (data length u32, stream id u32, both big-endian, type u8, flags u8)
and its data. A client opens streams with odd, increasing ids.

    connection = Connection(Role.SERVER)
    for event in connection.receive_data(sock.recv(65536)):   # ProtocolError: close the socket
        if isinstance(event, RequestReceived):
            connection.send_response(event.stream_id, reply)
    sock.sendall(connection.data_to_send())

Whoever does the I/O bounds the queue to the peer by not reading while `queued` is large.
"""

from __future__ import annotations

from struct import Struct

from ttrpc.envelope import (
    EnvelopeError,
    decode_request,
    decode_response,
    encode_status,
    request_head,
    response_head,
)
from ttrpc.errors import Code, ConnectionLost, ProtocolError, RpcError

TYPE_CHECKING = False  # the guest agent imports this: no typing, enum or dataclasses here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar

    from google.protobuf.any_pb2 import Any

    from ttrpc.envelope import Buffer

MAX_MESSAGE = 4 << 20
"""Data bytes of a frame: the limit of the Go implementation, in both directions."""

MAX_STREAMS = 4096
"""Calls that a client may have in flight at a server."""

MAX_REQUEST_BYTES = 64 << 20
"""Bytes of the requests in flight that a server holds for one client."""

HEADER_SIZE = 10

_HEADER = Struct(">IIBB")
_REQUEST, _RESPONSE, _DATA = 1, 2, 3
_REMOTE_CLOSED, _REMOTE_OPEN, _NO_DATA = 1, 2, 4
# The first byte of a frame is reserved and zero.
_LENGTH_LIMIT = 1 << 24
_LAST_STREAM_ID = (1 << 32) - 1
_MAX_STATUS_TEXT = 64 << 10


class Role:
    """Which end of the connection this is: Role.CLIENT or Role.SERVER."""

    CLIENT: ClassVar[Role]
    SERVER: ClassVar[Role]

    def __init__(self, name: str) -> None:
        self.name = name


Role.CLIENT, Role.SERVER = Role("client"), Role("server")


class _Event:
    """Equality and text by the slots. (The module dataclasses would cost the guest agent 100 ms.)"""

    __slots__ = ()

    def _values(self) -> list[object]:
        return [getattr(self, name) for name in self.__match_args__]

    __match_args__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = zip(self.__match_args__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values)})"


class RequestReceived(_Event):
    """A client opened a stream.

    Attributes:
        timeout_nano: nanoseconds the client will wait; 0: no limit; negative: already over.
        more: the client will send further messages. Then an empty payload is none, as with the
            Go implementation; else it is the one message of the client.
        streaming: the client takes messages back, or sends several: not a unary call.
    """

    __slots__ = __match_args__ = (
        "stream_id",
        "service",
        "method",
        "payload",
        "timeout_nano",
        "metadata",
        "more",
        "streaming",
    )

    def __init__(
        self,
        stream_id: int,
        service: str,
        method: str,
        payload: bytes,
        timeout_nano: int,
        metadata: list[tuple[str, str]],
        more: bool,
        streaming: bool = False,
    ) -> None:
        self.stream_id = stream_id
        self.service = service
        self.method = method
        self.payload = payload
        self.timeout_nano = timeout_nano
        self.metadata = metadata
        self.more = more
        self.streaming = streaming


class ResponseReceived(_Event):
    """A server ended a stream. details: serialized google.protobuf.Any messages."""

    __slots__ = __match_args__ = ("stream_id", "payload", "code", "message", "details")

    def __init__(
        self, stream_id: int, payload: bytes, code: int, message: str, details: list[bytes]
    ) -> None:
        self.stream_id = stream_id
        self.payload = payload
        self.code = code
        self.message = message
        self.details = details


class MessageReceived(_Event):
    """The peer sent a message (payload not None) on a stream, or its last sign (end), or both."""

    __slots__ = __match_args__ = ("stream_id", "payload", "end")

    def __init__(self, stream_id: int, payload: bytes | None, end: bool) -> None:
        self.stream_id = stream_id
        self.payload = payload
        self.end = end


class StreamFailed(_Event):
    """A server's call that the protocol itself ended, and answered: stop working on it."""

    __slots__ = __match_args__ = ("stream_id",)

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


class OversizeReceived(StreamFailed):
    """StreamFailed because of a message over the limit. (A client gets a ResponseReceived.)"""

    __slots__ = ()


class ConnectionEnded(_Event):
    """The peer closed the connection. clean: not within a frame."""

    __slots__ = __match_args__ = ("clean",)

    def __init__(self, clean: bool) -> None:
        self.clean = clean


Event = RequestReceived | ResponseReceived | MessageReceived | StreamFailed | ConnectionEnded


class Connection:
    """One end of a connection.

    Args:
        role: which end.
        max_message: data bytes of a frame; a larger one fails its own call only.
        max_streams: calls in flight that a server accepts; more are RESOURCE_EXHAUSTED.
        max_request_bytes: bytes of requests in flight that a server accepts; likewise.
    """

    def __init__(
        self,
        role: Role,
        *,
        max_message: int = MAX_MESSAGE,
        max_streams: int = MAX_STREAMS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._server = role is Role.SERVER
        self._max_message = max_message
        self._max_streams = max_streams
        self._max_request_bytes = max_request_bytes
        self._request_bytes = 0
        self._last_id = -1
        # Streams in flight. The value: a server's, the bytes of the request; a client's, 1 if
        # messages may come back, else 0.
        self._active: dict[int, int] = {}
        # Those on which the client (whichever end that is) may still send messages.
        self._open: set[int] = set()
        self._partial = bytearray()
        self._discard = 0
        self._out: list[bytes] = []
        self._queued = 0
        self._ended = False

    @property
    def queued(self) -> int:
        """Bytes that data_to_send() would give."""
        return self._queued

    @property
    def in_flight(self) -> int:
        """Streams that are neither answered nor forgotten."""
        return len(self._active)

    @property
    def missing(self) -> int:
        """Bytes up to the end of the frame that is coming in; 0 between frames."""
        if self._discard:
            return self._discard
        size = len(self._partial)
        if size < HEADER_SIZE:
            return HEADER_SIZE - size if size else 0
        length: int = _HEADER.unpack_from(self._partial)[0]
        return length + HEADER_SIZE - size

    def data_to_send(self) -> bytes:
        """Take all bytes to be sent; b"" if there are none."""
        out = self._out
        if not out:
            return b""
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        self._queued = 0
        return data

    # What comes in

    def receive_data(self, data: bytes) -> list[Event]:
        """Feed bytes that came from the peer.

        Raises:
            ProtocolError: a malformed frame; close the connection.
        """
        if self._ended:
            raise ProtocolError("data after the end of the connection")
        try:
            return self._receive(data)
        except ProtocolError:
            self._end()
            raise

    def receive_eof(self) -> list[Event]:
        """The peer closed the connection: nothing comes any more, and nothing can be sent."""
        if self._ended:
            return []
        clean = not self._partial and not self._discard
        self._end()
        return [ConnectionEnded(clean)]

    def _end(self) -> None:
        self._ended = True
        self._active.clear()
        self._open.clear()
        self._out.clear()
        self._queued = self._discard = self._request_bytes = 0
        self._partial = bytearray()

    def _receive(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        pos = 0
        size = len(data)
        if self._partial:
            pos = self._complete(data, events)
        while pos < size:
            if self._discard:
                step = min(self._discard, size - pos)
                self._discard -= step
                pos += step
                continue
            if size - pos < HEADER_SIZE:
                break
            length, stream_id, kind, flags = _HEADER.unpack_from(data, pos)
            if length > self._max_message:
                self._oversize(length, stream_id, kind, events)
                pos += HEADER_SIZE
                continue
            end = pos + HEADER_SIZE + length
            if end > size:
                break
            self._frame(stream_id, kind, flags, data, pos + HEADER_SIZE, end, events)
            pos = end
        if pos < size:
            self._partial += memoryview(data)[pos:]
        return events

    def _complete(self, data: bytes, events: list[Event]) -> int:
        """Finish the frame in _partial with the start of data. Returns the bytes taken."""
        partial = self._partial
        pos = 0
        size = len(data)
        view = memoryview(data)
        if len(partial) < HEADER_SIZE:
            pos = min(HEADER_SIZE - len(partial), size)
            partial += view[:pos]
            if len(partial) < HEADER_SIZE:
                return pos
        length, stream_id, kind, flags = _HEADER.unpack_from(partial)
        if length > self._max_message:
            partial.clear()
            self._oversize(length, stream_id, kind, events)
            return pos
        step: int = min(HEADER_SIZE + length - len(partial), size - pos)
        partial += view[pos : pos + step]
        pos += step
        if len(partial) == HEADER_SIZE + length:
            self._partial = bytearray()
            body = memoryview(partial)
            self._frame(stream_id, kind, flags, body, HEADER_SIZE, len(partial), events)
        return pos

    def _oversize(self, length: int, stream_id: int, kind: int, events: list[Event]) -> None:
        if length >= _LENGTH_LIMIT:
            raise ProtocolError(f"a frame of {length} bytes")
        self._discard = length
        text = f"a message of {length} bytes is over the limit of {self._max_message}"
        if self._server:
            if kind == _REQUEST and stream_id & 1:
                self._last_id = max(self._last_id, stream_id)
            elif kind != _DATA and kind != _REQUEST:
                raise ProtocolError(f"a frame of type {kind} from a client")
            if stream_id in self._active:
                events.append(OversizeReceived(stream_id))
            self._refuse(stream_id, Code.RESOURCE_EXHAUSTED, text)
        else:
            self._fail(stream_id, Code.RESOURCE_EXHAUSTED, text, events)

    def _frame(
        self,
        stream_id: int,
        kind: int,
        flags: int,
        data: Buffer,
        pos: int,
        end: int,
        events: list[Event],
    ) -> None:
        if kind == _DATA:
            payload = None if flags & _NO_DATA else bytes(data[pos:end])
            if self._server:
                self._data_at_server(stream_id, payload, bool(flags & _REMOTE_CLOSED), events)
            else:
                self._data_at_client(stream_id, payload, bool(flags & _REMOTE_CLOSED), events)
        elif self._server and kind == _REQUEST:
            self._request(stream_id, flags, data, pos, end, events)
        elif not self._server and kind == _RESPONSE:
            self._response(stream_id, data, pos, end, events)
        else:
            peer = "client" if self._server else "server"
            raise ProtocolError(f"a frame of type {kind} from a {peer}")

    def _request(
        self, stream_id: int, flags: int, data: Buffer, pos: int, end: int, events: list[Event]
    ) -> None:
        if not stream_id & 1:
            self._refuse(stream_id, Code.INVALID_ARGUMENT, "a client's stream id has to be odd")
            return
        if stream_id <= self._last_id:
            if stream_id in self._active:
                raise ProtocolError(f"a second request on stream {stream_id}")
            self._refuse(stream_id, Code.INVALID_ARGUMENT, "a client's stream ids have to grow")
            return
        self._last_id = stream_id
        try:
            request = decode_request(data, pos, end)
        except EnvelopeError as error:
            self._refuse(stream_id, Code.INVALID_ARGUMENT, f"not a request: {error}")
            return
        size = end - pos
        if len(self._active) >= self._max_streams:
            self._refuse(stream_id, Code.RESOURCE_EXHAUSTED, "too many calls in flight")
            return
        if self._request_bytes + size > self._max_request_bytes:
            self._refuse(stream_id, Code.RESOURCE_EXHAUSTED, "too large requests in flight")
            return
        self._request_bytes += size
        self._active[stream_id] = size
        more = bool(flags & _REMOTE_OPEN)
        if more:
            self._open.add(stream_id)
        events.append(
            RequestReceived(
                stream_id, *request, more, bool(flags & (_REMOTE_OPEN | _REMOTE_CLOSED))
            )
        )

    def _data_at_server(
        self, stream_id: int, payload: bytes | None, end: bool, events: list[Event]
    ) -> None:
        if stream_id in self._open:
            if end:
                self._open.discard(stream_id)
            if end or payload is not None:
                events.append(MessageReceived(stream_id, payload, end))
        elif stream_id in self._active:
            self._refuse(stream_id, Code.INVALID_ARGUMENT, "a message after the last one")
            events.append(StreamFailed(stream_id))
        elif stream_id > self._last_id or not stream_id & 1:
            self._refuse(stream_id, Code.INVALID_ARGUMENT, "a message on a stream not opened")
        # Else the stream was answered already: the message crossed the answer.

    def _data_at_client(
        self, stream_id: int, payload: bytes | None, end: bool, events: list[Event]
    ) -> None:
        streaming = self._active.get(stream_id)
        if streaming is None:
            return
        if not streaming:
            self._fail(stream_id, Code.INTERNAL, "a stream's message for a unary call", events)
            return
        if end:
            self.forget(stream_id)
        if end or payload is not None:
            events.append(MessageReceived(stream_id, payload, end))

    def _response(
        self, stream_id: int, data: Buffer, pos: int, end: int, events: list[Event]
    ) -> None:
        if self._active.pop(stream_id, None) is None:
            return
        self._open.discard(stream_id)
        try:
            response = decode_response(data, pos, end)
        except EnvelopeError as error:
            text = f"the answer can't be decoded: {error}"
            events.append(ResponseReceived(stream_id, b"", Code.INTERNAL, text, []))
        else:
            events.append(ResponseReceived(stream_id, *response))

    def _fail(self, stream_id: int, code: Code, message: str, events: list[Event]) -> None:
        """Let a client's call end with a status that the server didn't send."""
        if stream_id in self._active:
            self.forget(stream_id)
            events.append(ResponseReceived(stream_id, b"", code, message, []))

    def _refuse(self, stream_id: int, code: Code, message: str) -> None:
        """Answer a call that the implementation isn't to see, or to see no more of."""
        self.forget(stream_id)
        head = response_head(0, encode_status(code, message))
        self._send(stream_id, _RESPONSE, 0, head, b"")

    # What goes out

    def _send(self, stream_id: int, kind: int, flags: int, head: bytes, payload: bytes) -> None:
        size = len(head) + len(payload)
        frame = _HEADER.pack(size, stream_id, kind, flags) + head
        # A small payload is cheaper to copy here than to keep apart.
        if size < 4096:
            self._out.append(frame + payload)
        else:
            self._out.append(frame)
            self._out.append(payload)
        self._queued += size + HEADER_SIZE

    def forget(self, stream_id: int) -> None:
        """Let go of a stream: what still comes for it is ignored. Tells the peer nothing."""
        size = self._active.pop(stream_id, None)
        self._open.discard(stream_id)
        if self._server and size is not None:
            self._request_bytes -= size

    def send_request(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_nano: int = 0,
        metadata: Sequence[tuple[str, str]] = (),
        streaming: bool = False,
        more: bool = False,
    ) -> int:
        """Client: open a stream.

        Args:
            timeout_nano: nanoseconds after which the answer isn't waited for; 0 for no limit.
            streaming: messages may come back instead of one response.
            more: messages will follow with send_message() (implies streaming).

        Returns:
            the stream's id.

        Raises:
            RpcError: RESOURCE_EXHAUSTED, the request is over the limit; nothing was queued.
            ConnectionLost: the connection has ended.
        """
        if self._ended:
            raise ConnectionLost
        head = request_head(service, method, len(payload), timeout_nano, metadata)
        self._check_size(len(head) + len(payload))
        stream_id = self._last_id + 2
        if stream_id > _LAST_STREAM_ID:
            raise ConnectionLost("the connection has used up its stream ids")
        flags = _REMOTE_OPEN if more else _REMOTE_CLOSED if streaming else 0
        self._send(stream_id, _REQUEST, flags, head, payload)
        self._last_id = stream_id
        self._active[stream_id] = int(streaming or more)
        if more:
            self._open.add(stream_id)
        return stream_id

    def _check_size(self, size: int) -> None:
        if size > self._max_message:
            text = f"a message of {size} bytes is over the limit of {self._max_message}"
            raise RpcError(Code.RESOURCE_EXHAUSTED, text)

    def send_message(self, stream_id: int, payload: bytes) -> None:
        """Send one message of a stream; nothing if the stream is over.

        Raises:
            RpcError: RESOURCE_EXHAUSTED, it is over the limit; nothing was queued.
        """
        self._check_size(len(payload))
        if stream_id in (self._active if self._server else self._open):
            self._send(stream_id, _DATA, 0, b"", payload)

    def close_send(self, stream_id: int) -> None:
        """No more messages from this end. A server's stream is over with it, and was OK."""
        if self._server:
            if stream_id in self._active:
                self.forget(stream_id)
                self._send(stream_id, _DATA, _REMOTE_CLOSED | _NO_DATA, b"", b"")
        elif stream_id in self._open:
            self._open.discard(stream_id)
            self._send(stream_id, _DATA, _REMOTE_CLOSED | _NO_DATA, b"", b"")

    def send_response(
        self,
        stream_id: int,
        payload: bytes = b"",
        code: int = 0,
        message: str = "",
        details: Sequence[Any] = (),
    ) -> None:
        """Server: end a stream with a last message or a status; nothing if it is over already.

        A stream of messages that ended well is ended by close_send() instead: a peer takes the
        payload of this for one more message. What is over the limit becomes RESOURCE_EXHAUSTED.
        """
        size = self._active.pop(stream_id, None)
        if size is None:
            return
        self._open.discard(stream_id)
        self._request_bytes -= size
        status = encode_status(code, message, details) if code else b""
        head = response_head(len(payload), status)
        size = len(head) + len(payload)
        if size > self._max_message:
            payload = b""
            if code:
                text, why = message[:_MAX_STATUS_TEXT], code
            else:
                text = f"an answer of {size} bytes is over the limit of {self._max_message}"
                why = Code.RESOURCE_EXHAUSTED
            head = response_head(0, encode_status(why, text))
        self._send(stream_id, _RESPONSE, 0, head, payload)
