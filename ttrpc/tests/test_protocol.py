# SPDX-License-Identifier: Apache-2.0
"""The protocol without I/O."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from ttrpc.envelope import MAX_METADATA, EnvelopeError, decode_request, decode_response
from ttrpc.errors import Code, ConnectionLost, ProtocolError, RpcError
from ttrpc.protocol import (
    Connection,
    ConnectionEnded,
    MessageReceived,
    OversizeReceived,
    RequestReceived,
    ResponseReceived,
    Role,
    StreamFailed,
)


def frame(stream_id: int, kind: int, flags: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIBB", len(data), stream_id, kind, flags) + data


def ends(**limits: int) -> tuple[Connection, Connection]:
    return Connection(Role.CLIENT), Connection(Role.SERVER, **limits)


def _reference() -> tuple[type, type]:
    """Request and Response as protobuf itself has them, in a pool of their own."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="reference.proto", package="r", syntax="proto3", dependency=[any_pb2.DESCRIPTOR.name]
    )
    kinds = {"string": 9, "bytes": 12, "int64": 3, "int32": 5}

    def add(name: str, *fields: tuple[str, int, str]) -> None:
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            one = message.field.add(name=field, number=number)
            one.label = 3 if kind.startswith("*") else 1
            if kind in kinds:
                one.type = kinds[kind]
            else:
                one.type, one.type_name = 11, kind.lstrip("*")

    add("KeyValue", ("key", 1, "string"), ("value", 2, "string"))
    add(
        "Request",
        ("service", 1, "string"),
        ("method", 2, "string"),
        ("payload", 3, "bytes"),
        ("timeout_nano", 4, "int64"),
        ("metadata", 5, "*.r.KeyValue"),
    )
    add(
        "Status",
        ("code", 1, "int32"),
        ("message", 2, "string"),
        ("details", 3, "*.google.protobuf.Any"),
    )
    add("Response", ("status", 1, ".r.Status"), ("payload", 2, "bytes"))
    pool.Add(file)
    made = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"r.{name}"))
        for name in ("Request", "Response")
    ]
    return made[0], made[1]


REQUEST, RESPONSE = _reference()
text = st.text(max_size=200)
blob = st.binary(max_size=6000)
pairs = st.lists(st.tuples(text, text), max_size=5)


def body(data: bytes) -> bytes:
    return data[10:]


@given(text, text, blob, st.integers(0, 2**63 - 1), pairs)
def test_request_is_what_protobuf_reads(
    service: str, method: str, payload: bytes, timeout: int, metadata: list[tuple[str, str]]
) -> None:
    client, server = ends()
    client.send_request(service, method, payload, timeout_nano=timeout, metadata=metadata)
    data = client.data_to_send()
    read = REQUEST.FromString(body(data))
    assert (read.service, read.method, read.payload) == (service, method, payload)
    assert read.timeout_nano == timeout
    assert [(pair.key, pair.value) for pair in read.metadata] == metadata
    (event,) = server.receive_data(data)
    assert isinstance(event, RequestReceived)
    assert (event.service, event.method, event.payload) == (service, method, payload)
    assert (event.timeout_nano, event.metadata, event.more) == (timeout, metadata, False)


@given(text, text, blob, st.integers(-(2**63), 2**63 - 1), pairs)
def test_request_that_protobuf_wrote(
    service: str, method: str, payload: bytes, timeout: int, metadata: list[tuple[str, str]]
) -> None:
    message = REQUEST(service=service, method=method, payload=payload, timeout_nano=timeout)
    for key, value in metadata:
        message.metadata.add(key=key, value=value)
    data = message.SerializeToString()
    assert decode_request(data, 0, len(data)) == (service, method, payload, timeout, metadata)


@given(blob, st.integers(-(2**31), 2**31 - 1), text, st.lists(blob, max_size=3))
def test_response_both_ways(payload: bytes, code: int, message: str, details: list[bytes]) -> None:
    packed = [any_pb2.Any(type_url="x/y", value=value) for value in details]
    written = RESPONSE(payload=payload)
    written.status.code, written.status.message = code, message
    for one in packed:
        written.status.details.add(type_url=one.type_url, value=one.value)
    data = written.SerializeToString()
    serialized = [one.SerializeToString() for one in packed]
    assert decode_response(data, 0, len(data)) == (payload, code, message, serialized)

    client, server = ends()
    stream_id = client.send_request("s", "m", b"")
    server.receive_data(client.data_to_send())
    server.send_response(stream_id, payload, code, message, packed)
    answer = server.data_to_send()
    if code:
        assert RESPONSE.FromString(body(answer)) == written
        wanted = ResponseReceived(stream_id, payload, code, message, serialized)
    else:
        wanted = ResponseReceived(stream_id, payload, 0, "", [])
    assert client.receive_data(answer) == [wanted]


@given(st.binary(max_size=300))
def test_decoders_take_any_bytes(data: bytes) -> None:
    for decode, reference, at in ((decode_request, REQUEST, 2), (decode_response, RESPONSE, 0)):
        try:
            decoded = decode(data, 0, len(data))
        except EnvelopeError:
            continue
        try:
            reference.FromString(data)
        except Exception:
            continue  # we are laxer about fields that we don't know
        assert isinstance(decoded[at], bytes)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    st.lists(st.integers(1, 4000), min_size=1, max_size=10),
)
def test_bytes_may_come_in_any_pieces(sizes: list[int], steps: list[int]) -> None:
    limit = 2000
    client = Connection(Role.CLIENT, max_message=10_000)
    for size in sizes:
        client.send_request("service", "Method", bytes(size), more=size % 2 == 0)
        client.send_message(1, bytes(size))
    wire = client.data_to_send()
    whole = Connection(Role.SERVER, max_message=limit)
    events = whole.receive_data(wire)
    answers = whole.data_to_send()
    pieces = Connection(Role.SERVER, max_message=limit)
    found = []
    pos = 0
    for step in itertools.cycle(steps):
        found += pieces.receive_data(wire[pos : pos + step])
        pos += step
        if pos >= len(wire):
            break
    assert found == events
    assert pieces.data_to_send() == answers
    assert pieces.missing == 0


@given(st.lists(st.binary(max_size=100), max_size=20), st.sampled_from([Role.CLIENT, Role.SERVER]))
def test_any_bytes_are_taken_or_a_protocol_error(chunks: list[bytes], role: Role) -> None:
    connection = Connection(role, max_message=1000)
    if role is Role.CLIENT:
        connection.send_request("s", "m", b"", more=True)
    try:
        for chunk in chunks:
            connection.receive_data(chunk)
    except ProtocolError:
        assert connection.in_flight == connection.queued == 0
        with pytest.raises(ProtocolError):
            connection.receive_data(b"")


def test_stream_both_ways() -> None:
    client, server = ends()
    stream_id = client.send_request("s", "m", b"", more=True)
    client.send_message(stream_id, b"one")
    client.send_message(stream_id, b"")
    client.close_send(stream_id)
    client.send_message(stream_id, b"late")
    request, *messages = server.receive_data(client.data_to_send())
    assert isinstance(request, RequestReceived)
    assert request.more
    assert messages == [
        MessageReceived(1, b"one", False),
        MessageReceived(1, b"", False),
        MessageReceived(1, None, True),
    ]
    server.send_message(stream_id, b"reply")
    server.close_send(stream_id)
    server.send_message(stream_id, b"late")
    server.send_response(stream_id, b"late")
    assert client.receive_data(server.data_to_send()) == [
        MessageReceived(1, b"reply", False),
        MessageReceived(1, None, True),
    ]
    assert client.in_flight == server.in_flight == 0


def test_the_last_message_may_end_the_stream() -> None:
    client, server = ends()
    client.send_request("s", "m", b"", more=True)
    server.receive_data(client.data_to_send())
    assert server.receive_data(frame(1, 3, 1, b"last")) == [MessageReceived(1, b"last", True)]
    assert client.receive_data(frame(1, 3, 1, b"last")) == [MessageReceived(1, b"last", True)]


def test_oversize_fails_its_call_only() -> None:
    client, server = Connection(Role.CLIENT, max_message=9999), Connection(Role.SERVER)
    server = Connection(Role.SERVER, max_message=500)
    client.send_request("s", "m", bytes(1000))
    good = client.send_request("s", "m", b"x")
    stream = client.send_request("s", "m", b"", more=True)
    client.send_message(stream, bytes(1000))
    events = server.receive_data(client.data_to_send())
    assert [event.stream_id for event in events] == [good, stream, stream]
    assert isinstance(events[-1], OversizeReceived)
    server.send_response(good, b"fine")
    server.send_response(stream, b"too late")
    answers = client.receive_data(server.data_to_send())
    assert [(answer.stream_id, answer.code) for answer in answers] == [
        (1, Code.RESOURCE_EXHAUSTED),
        (stream, Code.RESOURCE_EXHAUSTED),
        (good, 0),
    ]
    assert server.in_flight == client.in_flight == 0


def test_oversize_at_the_sender() -> None:
    client, server = ends()
    with pytest.raises(RpcError) as caught:
        client.send_request("s", "m", bytes(4 << 20))
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert (client.queued, client.in_flight) == (0, 0)
    stream_id = client.send_request("s", "m", b"", more=True)
    with pytest.raises(RpcError):
        client.send_message(stream_id, bytes((4 << 20) + 1))
    server.receive_data(client.data_to_send())
    server.send_response(stream_id, bytes(4 << 20))
    (answer,) = client.receive_data(server.data_to_send())
    assert (answer.payload, answer.code) == (b"", Code.RESOURCE_EXHAUSTED)
    stream_id = client.send_request("s", "m", b"")
    server.receive_data(client.data_to_send())
    server.send_response(stream_id, b"", Code.ABORTED, "x" * (5 << 20))
    (answer,) = client.receive_data(server.data_to_send())
    assert (answer.code, len(answer.message)) == (Code.ABORTED, 64 << 10)


@pytest.mark.parametrize(
    ("role", "data"),
    [
        (Role.SERVER, b"GET / HTTP/1.1\r\n\r\n"),
        (Role.SERVER, frame(1, 0)),
        (Role.SERVER, frame(1, 2)),
        (Role.SERVER, frame(1, 4)),
        (Role.CLIENT, frame(1, 1)),
        (Role.CLIENT, frame(1, 255)),
        (Role.CLIENT, b"\xff" * 10),
    ],
)
def test_malformed_frames(role: Role, data: bytes) -> None:
    connection = Connection(role)
    with pytest.raises(ProtocolError):
        connection.receive_data(data)
    if role is Role.CLIENT:
        with pytest.raises(ConnectionLost):
            connection.send_request("s", "m", b"")


def _refused(server: Connection) -> list[tuple[int, int]]:
    data = server.data_to_send()
    found = []
    while data:
        size, stream_id, kind, _ = struct.unpack(">IIBB", data[:10])
        assert kind == 2
        found.append((stream_id, RESPONSE.FromString(data[10 : 10 + size]).status.code))
        data = data[10 + size :]
    return found


def test_what_a_server_refuses() -> None:
    server = Connection(Role.SERVER)
    request = REQUEST(service="s", method="m").SerializeToString()
    invalid = Code.INVALID_ARGUMENT
    assert server.receive_data(frame(2, 1, 0, request)) == []
    assert server.receive_data(frame(0, 1, 0, request)) == []
    assert server.receive_data(frame(5, 1, 0, b"\xff")) == []
    assert server.receive_data(frame(3, 1, 0, request)) == []
    assert server.receive_data(frame(99, 3, 0, b"")) == []
    assert _refused(server) == [
        (2, invalid),
        (0, invalid),
        (5, invalid),
        (3, invalid),
        (99, invalid),
    ]
    assert len(server.receive_data(frame(7, 1, 0, request))) == 1
    assert server.receive_data(frame(7, 3, 0, b"")) == [StreamFailed(7)]
    assert _refused(server) == [(7, invalid)]
    # A message that crossed the answer is nothing to be answered.
    assert server.receive_data(frame(7, 3, 0, b"")) == []
    assert _refused(server) == []
    assert len(server.receive_data(frame(9, 1, 0, request))) == 1
    with pytest.raises(ProtocolError, match="second request"):
        server.receive_data(frame(9, 1, 0, request))


def test_what_a_client_makes_of_nonsense() -> None:
    client = Connection(Role.CLIENT)
    first = client.send_request("s", "m", b"")
    second = client.send_request("s", "m", b"")
    (event,) = client.receive_data(frame(first, 3, 0, b"data on a unary call"))
    assert (event.stream_id, event.code) == (first, Code.INTERNAL)
    (event,) = client.receive_data(frame(second, 2, 0, b"\xff\xff"))
    assert (event.stream_id, event.code) == (second, Code.INTERNAL)
    for stream_id in (first, 77, 4):
        assert client.receive_data(frame(stream_id, 2) + frame(stream_id, 3)) == []


def test_bounds_on_what_is_in_flight() -> None:
    client, server = ends(max_streams=10, max_request_bytes=5000)
    for _ in range(12):
        client.send_request("s", "m", b"")
    assert len(server.receive_data(client.data_to_send())) == 10
    assert _refused(server) == [(21, Code.RESOURCE_EXHAUSTED), (23, Code.RESOURCE_EXHAUSTED)]
    for stream_id in range(1, 20, 2):
        server.send_response(stream_id)
    server.data_to_send()
    for _ in range(4):
        client.send_request("s", "m", bytes(1500))
    assert len(server.receive_data(client.data_to_send())) == 3
    assert _refused(server) == [(31, Code.RESOURCE_EXHAUSTED)]
    server.send_response(25)
    client.send_request("s", "m", bytes(1500))
    assert len(server.receive_data(client.data_to_send())) == 1


def test_metadata_is_bounded() -> None:
    data = b"\x2a\x00" * MAX_METADATA
    assert len(decode_request(data, 0, len(data))[4]) == MAX_METADATA
    data += b"\x2a\x00"
    with pytest.raises(EnvelopeError, match="metadata"):
        decode_request(data, 0, len(data))


def test_eof() -> None:
    client, server = ends()
    client.send_request("s", "m", b"")
    data = client.data_to_send()
    server.receive_data(data[:5])
    assert server.receive_eof() == [ConnectionEnded(False)]
    assert server.receive_eof() == []
    assert client.receive_eof() == [ConnectionEnded(True)]
    with pytest.raises(ConnectionLost):
        client.send_request("s", "m", b"")


def test_a_claimed_size_costs_nothing() -> None:
    server = Connection(Role.SERVER)
    server.receive_data(struct.pack(">IIBB", 4 << 20, 1, 1, 0))
    assert server.missing == 4 << 20
    assert len(server._partial) == 10


def test_stream_ids_run_out() -> None:
    client = Connection(Role.CLIENT)
    client._last_id = (1 << 32) - 3
    assert client.send_request("s", "m", b"") == (1 << 32) - 1
    with pytest.raises(ConnectionLost, match="stream ids"):
        client.send_request("s", "m", b"")


def test_the_protocol_imports_little() -> None:
    """It is on the way of the guest agent's start."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "import ttrpc.protocol, ttrpc.errors, ttrpc.envelope\n"
        "costly = {'trio', 'google', 'typing', 'dataclasses', 'inspect', 're'}\n"
        "print(sorted(costly & {name.split('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
