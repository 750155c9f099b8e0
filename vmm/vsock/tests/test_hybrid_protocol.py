# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.vsock.hybrid_protocol import ClientHandshake, HandshakeError, ServerHandshake


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=20), st.integers(1, 30))
def test_both_sides_understand_each_other(port: int, rest: bytes, cut: int) -> None:
    server = ServerHandshake()
    data = ClientHandshake.request(port) + rest
    pieces = [data[i : i + cut] for i in range(0, len(data), cut)]
    while not server.receive(pieces.pop(0)):
        pass
    assert server.port == port
    assert server.rest + b"".join(pieces) == rest
    client = ClientHandshake()
    assert client.receive(ServerHandshake.accept(port))
    assert client.port == port


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"connect 1024\n",
        b"CONNECT\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1024 x\n",
        b"CONNECT " + b"1" * 100,
        b"OK 1\n",
        b"\n",
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises(HandshakeError):
        ServerHandshake().receive(data)


def test_end_of_stream_in_the_middle() -> None:
    handshake = ClientHandshake()
    assert not handshake.receive(b"OK 1")
    with pytest.raises(HandshakeError, match="closed"):
        handshake.receive(b"")
