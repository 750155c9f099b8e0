# SPDX-License-Identifier: Apache-2.0
"""What lab and owner say to each other over the virtio-serial port: frames, without I/O.

A frame is a kind (u8), a length (u32, little-endian) and as many bytes. This file runs on both
sides, so it imports nothing of ours.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

PORT = "pykata.lab"

HELLO = 1  # from the lab, once it serves: its kernel's release
RUN = 2  # to the lab: a Command as JSON; there is one at a time
INPUT = 3  # to the lab: for stdin; empty is its end
SIZE = 4  # to the lab: rows and columns of the terminal (u16, u16)
KILL = 5  # to the lab: end the command and all it has started
OUTPUT = 6  # from the lab
ERRORS = 7  # from the lab: stderr
EXIT = 8  # from the lab: status (i32), negative for a signal; all output came before

HEADER = struct.Struct("<BI")
WINDOW = struct.Struct("<HH")
STATUS = struct.Struct("<i")
LIMIT = 1 << 20


class WireError(Exception):
    """The other side sent what is no frame."""


def frame(kind: int, data: bytes = b"") -> bytes:
    """One frame as bytes."""
    return HEADER.pack(kind, len(data)) + data


class Reader:
    """Puts frames together."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take bytes; yields (kind, data) of each frame that is whole.

        Raises:
            WireError: a kind or a length that does not exist.
        """
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            kind, size = HEADER.unpack_from(self._buffer)
            if not HELLO <= kind <= EXIT or size > LIMIT:
                raise WireError(f"frame of kind {kind} with {size} bytes")
            end = HEADER.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield kind, body
