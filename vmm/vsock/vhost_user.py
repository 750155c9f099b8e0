# SPDX-License-Identifier: Apache-2.0
"""vhost-user messages, without I/O: bytes and descriptors in, messages out, and replies.

Numbers are those of QEMU's ``docs/interop/vhost-user``.  All integers are little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HEADER = struct.Struct("<III")  # request, flags, size of the payload
_U64 = struct.Struct("<Q")
_VRING_STATE = struct.Struct("<II")  # index, number
_VRING_ADDR = struct.Struct("<IIQQQQ")  # index, flags, descriptors, used, available, log
_REGION = struct.Struct("<QQQQ")  # guest address, size, front-end's address, offset in the file
_CONFIG = struct.Struct("<III")  # offset, size, flags

#: The largest message we know is SET_MEM_TABLE (8 + 8 * 32 bytes) or a config of 256 bytes.
MAX_PAYLOAD = 1024
MAX_FDS = 8

VERSION = 1
_VERSION_MASK = 3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
GET_CONFIG = 24
SET_CONFIG = 25
RESET_DEVICE = 34
GET_MAX_MEM_SLOTS = 36
ADD_MEM_REG = 37
REM_MEM_REG = 38

F_MQ = 1 << 0
F_REPLY_ACK = 1 << 3
F_CONFIG = 1 << 9
F_RESET_DEVICE = 1 << 13
F_CONFIGURE_MEM_SLOTS = 1 << 15

#: In the payload of SET_VRING_KICK/CALL/ERR: the ring's index, and "no descriptor follows".
VRING_INDEX = 0xFF
VRING_NO_FD = 1 << 8


class VhostUserError(Exception):
    """The front-end broke the protocol; its connection can't be used any more."""


@dataclass(slots=True)
class Message:
    """One request.  Whoever takes it owns `fds` until `close`; taken ones are popped."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)

    def take_fd(self) -> int:
        """Raises VhostUserError if none came along."""
        if not self.fds:
            raise VhostUserError(f"request {self.request} without its file descriptor")
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())

    def _unpack(self, layout: struct.Struct, offset: int = 0) -> tuple[Any, ...]:
        try:
            return layout.unpack_from(self.payload, offset)
        except struct.error:
            raise VhostUserError(
                f"request {self.request} has {len(self.payload)} bytes of payload"
            ) from None

    def u64(self) -> int:
        value: int = self._unpack(_U64)[0]
        return value

    def vring_state(self) -> tuple[int, int]:
        """(index, number)"""
        index, number = self._unpack(_VRING_STATE)
        return index, number

    def vring_addr(self) -> tuple[int, int, int, int]:
        """(index, descriptors, available, used); addresses are the front-end's."""
        index, _flags, descriptors, used, available, _log = self._unpack(_VRING_ADDR)
        return index, descriptors, available, used

    def regions(self) -> list[tuple[int, int, int, int]]:
        """Of SET_MEM_TABLE: [(guest address, size, front-end's address, offset)], one fd each."""
        (count, _padding) = self._unpack(_VRING_STATE)
        if count > MAX_FDS or count != len(self.fds):
            raise VhostUserError(f"memory table of {count} regions with {len(self.fds)} fds")
        return [self._region(8 + i * _REGION.size) for i in range(count)]

    def region(self) -> tuple[int, int, int, int]:
        """Of ADD_MEM_REG and REM_MEM_REG, as in `regions`."""
        return self._region(8)

    def _region(self, offset: int) -> tuple[int, int, int, int]:
        start, size, user_start, file_offset = self._unpack(_REGION, offset)
        return start, size, user_start, file_offset

    def config(self) -> tuple[int, int]:
        """Of GET_CONFIG: (offset, size)."""
        offset, size, _flags = self._unpack(_CONFIG)
        return offset, size


def reply_u64(request: int, value: int) -> bytes:
    return HEADER.pack(request, VERSION | FLAG_REPLY, 8) + _U64.pack(value)


def reply_vring_state(request: int, index: int, number: int) -> bytes:
    return HEADER.pack(request, VERSION | FLAG_REPLY, 8) + _VRING_STATE.pack(index, number)


def reply_config(offset: int, data: bytes) -> bytes:
    """`data` empty says that the request was refused."""
    if not data:
        return HEADER.pack(GET_CONFIG, VERSION | FLAG_REPLY, 0)
    body = _CONFIG.pack(offset, len(data), 0) + data
    return HEADER.pack(GET_CONFIG, VERSION | FLAG_REPLY, len(body)) + body


class Parser:
    """Puts messages together.

    Descriptors belong to the message whose bytes they came with; so read no further than
    `wanted` bytes at a time, and no byte of the next message comes in between.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._need = HEADER.size

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at most."""
        return self._need - len(self._buffer)

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Take what was read; returns a message once it is whole.

        Raises:
            VhostUserError: more bytes than wanted, a bad version, an absurd size, too many
                descriptors.  The descriptors are ours to close even then (`close`).
        """
        self._fds += fds
        self._buffer += data
        if len(self._fds) > MAX_FDS:
            raise VhostUserError("too many file descriptors in one message")
        if len(self._buffer) > self._need:
            raise VhostUserError("more bytes than asked for")
        if len(self._buffer) < self._need:
            return None
        request, flags, size = HEADER.unpack_from(self._buffer)
        if self._need == HEADER.size:
            if flags & _VERSION_MASK != VERSION or flags & FLAG_REPLY:
                raise VhostUserError(f"message flags {flags:#x}")
            if size > MAX_PAYLOAD:
                raise VhostUserError(f"payload of {size} bytes")
            if size:
                self._need += size
                return None
        message = Message(request, flags, bytes(self._buffer[HEADER.size :]), self._fds)
        self._buffer.clear()
        self._fds = []
        self._need = HEADER.size
        return message

    def close(self) -> None:
        """Close descriptors of a message that never became whole."""
        while self._fds:
            os.close(self._fds.pop())
