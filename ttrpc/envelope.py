# SPDX-License-Identifier: Apache-2.0
"""The protobuf messages inside request and response frames, encoded and decoded by hand.

Generated code would register google/rpc/status.proto in protobuf's one pool, where the copy of
any other library in the process collides with it; and by hand the payload is never copied into
a message and out again. Field numbers: request.proto of containerd/ttrpc, google/rpc/status.proto.
"""

from __future__ import annotations

TYPE_CHECKING = False  # the guest agent imports this: no typing, functools or collections here
if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.any_pb2 import Any

    # What is decoded from: slices of either become bytes without a second copy.
    Buffer = bytes | memoryview
    # service, method, payload, timeout_nano (0: none, negative: already over), metadata
    Request = tuple[str, str, bytes, int, list[tuple[str, str]]]
    # payload, code, message, details (serialized google.protobuf.Any messages)
    Response = tuple[bytes, int, str, list[bytes]]

MAX_METADATA = 1024
"""Pairs in a request. A frame of empty pairs would else become 100 MB of tuples."""

MAX_DETAILS = 256
"""Details of a status."""

_INT64_MAX = (1 << 63) - 1


class EnvelopeError(ValueError):
    """The bytes of a frame are no such message."""


def varint(number: int) -> bytes:
    """A non-negative number below 2**64 as protobuf's base-128 varint."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(tag: int, value: bytes) -> bytes:
    return bytes((tag,)) + varint(len(value)) + value


_routes: dict[tuple[str, str], bytes] = {}
_MAX_ROUTES = 1024


def _route(service: str, method: str) -> bytes:
    known = _routes.get((service, method))
    if known is not None:
        return known
    out = b""
    if service:
        out += _field(0x0A, service.encode())
    if method:
        out += _field(0x12, method.encode())
    if len(_routes) < _MAX_ROUTES:
        _routes[service, method] = out
    return out


def request_head(
    service: str,
    method: str,
    size: int,
    timeout_nano: int = 0,
    metadata: Sequence[tuple[str, str]] = (),
) -> bytes:
    """A Request up to its payload of `size` bytes, which comes last and has to follow."""
    head = _route(service, method)
    if timeout_nano:
        head += b"\x20" + varint(min(timeout_nano, _INT64_MAX) & 0xFFFFFFFFFFFFFFFF)
    for key, value in metadata:
        head += _field(0x2A, _field(0x0A, key.encode()) + _field(0x12, value.encode()))
    if size:
        head += b"\x1a" + varint(size)
    return head


def response_head(size: int, status: bytes = b"") -> bytes:
    """A Response up to its payload of `size` bytes, which has to follow."""
    head = _field(0x0A, status) if status else b""
    return head + b"\x12" + varint(size) if size else head


def encode_status(code: int, message: str, details: Sequence[Any] = ()) -> bytes:
    """A google.rpc.Status; b"" for a plain OK, which is left out on the wire."""
    out = b"\x08" + varint(code & 0xFFFFFFFFFFFFFFFF) if code else b""
    if message:
        out += _field(0x12, message.encode(errors="replace"))
    for detail in details:
        out += _field(0x1A, detail.SerializeToString())
    return out


def _read_varint(data: Buffer, pos: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while pos < end:
        byte = data[pos]
        pos += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, pos
        shift += 7
        if shift > 63:
            raise EnvelopeError("a varint of more than ten bytes")
    raise EnvelopeError("a field ends too early")


def _span(data: Buffer, pos: int, end: int) -> tuple[int, int]:
    """Start and end of a length-delimited value whose length is at pos."""
    if pos < end and data[pos] < 0x80:
        start = pos + 1
        stop = start + data[pos]
    else:
        size, start = _read_varint(data, pos, end)
        stop = start + size
    if stop > end:
        raise EnvelopeError("a field ends too early")
    return start, stop


def _skip(tag: int, data: Buffer, pos: int, end: int) -> int:
    """The position after a value that isn't known here, as newer peers may send."""
    kind = tag & 7
    if tag < 8:
        raise EnvelopeError("field number 0")
    if kind == 0:
        pos = _read_varint(data, pos, end)[1]
    elif kind == 1:
        pos += 8
    elif kind == 2:
        pos = _span(data, pos, end)[1]
    elif kind == 5:
        pos += 4
    else:
        raise EnvelopeError(f"wire type {kind}")
    if pos > end:
        raise EnvelopeError("a field ends too early")
    return pos


def _text(data: Buffer, start: int, stop: int) -> str:
    try:
        return str(data[start:stop], "utf-8")
    except UnicodeDecodeError as error:
        raise EnvelopeError("a string that isn't UTF-8") from error


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def decode_request(data: Buffer, pos: int, end: int) -> Request:
    """Decode the Request in data[pos:end].

    Raises:
        EnvelopeError: it is none, or has more than MAX_METADATA pairs.
    """
    service = method = ""
    payload = b""
    timeout = 0
    metadata: list[tuple[str, str]] = []
    while pos < end:
        tag = data[pos]
        if tag == 0x0A:
            start, pos = _span(data, pos + 1, end)
            service = _text(data, start, pos)
        elif tag == 0x12:
            start, pos = _span(data, pos + 1, end)
            method = _text(data, start, pos)
        elif tag == 0x1A:
            start, pos = _span(data, pos + 1, end)
            payload = bytes(data[start:pos])
        elif tag == 0x20:
            number, pos = _read_varint(data, pos + 1, end)
            timeout = _signed(number)
        elif tag == 0x2A:
            start, pos = _span(data, pos + 1, end)
            if len(metadata) == MAX_METADATA:
                raise EnvelopeError(f"more than {MAX_METADATA} metadata pairs")
            metadata.append(_decode_pair(data, start, pos))
        else:
            tag, pos = _read_varint(data, pos, end)
            pos = _skip(tag, data, pos, end)
    return service, method, payload, timeout, metadata


def _decode_pair(data: Buffer, pos: int, end: int) -> tuple[str, str]:
    key = value = ""
    while pos < end:
        tag = data[pos]
        if tag == 0x0A:
            start, pos = _span(data, pos + 1, end)
            key = _text(data, start, pos)
        elif tag == 0x12:
            start, pos = _span(data, pos + 1, end)
            value = _text(data, start, pos)
        else:
            tag, pos = _read_varint(data, pos, end)
            pos = _skip(tag, data, pos, end)
    return key, value


def decode_response(data: Buffer, pos: int, end: int) -> Response:
    """Decode the Response in data[pos:end].

    Raises:
        EnvelopeError: it is none, or its status has more than MAX_DETAILS details.
    """
    payload = b""
    code = 0
    message = ""
    details: list[bytes] = []
    while pos < end:
        tag = data[pos]
        if tag == 0x12:
            start, pos = _span(data, pos + 1, end)
            payload = bytes(data[start:pos])
        elif tag == 0x0A:
            start, pos = _span(data, pos + 1, end)
            code, message, details = _decode_status(data, start, pos)
        else:
            tag, pos = _read_varint(data, pos, end)
            pos = _skip(tag, data, pos, end)
    return payload, code, message, details


def _decode_status(data: Buffer, pos: int, end: int) -> tuple[int, str, list[bytes]]:
    code = 0
    message = ""
    details: list[bytes] = []
    while pos < end:
        tag = data[pos]
        if tag == 0x08:
            number, pos = _read_varint(data, pos + 1, end)
            number &= 0xFFFFFFFF
            code = number - (1 << 32) if number >> 31 else number
        elif tag == 0x12:
            start, pos = _span(data, pos + 1, end)
            message = _text(data, start, pos)
        elif tag == 0x1A:
            start, pos = _span(data, pos + 1, end)
            if len(details) == MAX_DETAILS:
                raise EnvelopeError(f"more than {MAX_DETAILS} details")
            details.append(bytes(data[start:pos]))
        else:
            tag, pos = _read_varint(data, pos, end)
            pos = _skip(tag, data, pos, end)
    return code, message, details
