# SPDX-License-Identifier: Apache-2.0
"""The handshake of hybrid vsock, both sides, without I/O.

On a unix socket the client says ``CONNECT <port>\\n``; the server answers ``OK <host port>\\n``
and from then on the bytes are the stream's.  A refusal is the end of the connection.
"""

from __future__ import annotations

import re

#: ``CONNECT 4294967295\n`` has 19 bytes.
MAX_LINE = 32
_PORT_LIMIT = 1 << 32

_CONNECT = re.compile(rb"CONNECT ([0-9]{1,10})\r?")
_OK = re.compile(rb"OK ([0-9]{1,10})\r?")


class HandshakeError(Exception):
    """The peer did not say what it should have."""


class _Handshake:
    """Collects the peer's one line.  `receive` returns True once it is there; `port` is the
    number in it and `rest` what came after it, which belongs to the stream."""

    _pattern: re.Pattern[bytes]

    def __init__(self) -> None:
        self._buffer = b""
        self.port = -1
        self.rest = b""

    def receive(self, data: bytes) -> bool:
        """Take bytes of the peer.

        Raises:
            HandshakeError: end of stream, a line that is too long, or not the one expected.
        """
        if not data:
            raise HandshakeError("closed during the handshake")
        self._buffer += data
        line, newline, rest = self._buffer.partition(b"\n")
        if len(line) > MAX_LINE:
            raise HandshakeError(f"more than {MAX_LINE} bytes in a line")
        if not newline:
            return False
        match = self._pattern.fullmatch(line)
        if match is None or int(match[1]) >= _PORT_LIMIT:
            raise HandshakeError(f"unexpected line {line!r}")
        self.port = int(match[1])
        self.rest = rest
        return True


class ClientHandshake(_Handshake):
    """The side that connects; `port` is then the host port."""

    _pattern = _OK

    @staticmethod
    def request(port: int) -> bytes:
        return b"CONNECT %d\n" % port


class ServerHandshake(_Handshake):
    """The side that is asked; `port` is then the guest port."""

    _pattern = _CONNECT

    @staticmethod
    def accept(host_port: int) -> bytes:
        return b"OK %d\n" % host_port
