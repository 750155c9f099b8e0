# SPDX-License-Identifier: Apache-2.0
"""rtnetlink: its messages, and a socket to the kernel.

Numbers are those of linux/netlink.h, rtnetlink.h, if_link.h, neighbour.h and pkt_sched.h.
A socket belongs to the network namespace it was made in, whoever uses it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 2, 3, 4
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_EXCL, NLM_F_CREATE, NLM_F_REPLACE = 0x200, 0x400, 0x100
NLM_F_DUMP_INTR = 0x10

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER = 44, 45

RTMGRP_LINK, RTMGRP_NEIGH = 0x1, 0x4
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x10, 0x40
RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE = 0x100, 0x400

LINK = struct.Struct("=BxHiII")  # family, hardware type, index, flags, flags to change
ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
ROUTE = struct.Struct("=BBBBBBBBI")  # family, dst, src, tos, table, protocol, scope, type, flags
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
TC = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # the two upper bits tell of nesting and byte order
_BUFFER = 1 << 18  # bytes; the kernel sends a dump in pieces of 32 KiB at the most
_TRIES = 8


class NetlinkError(OSError):
    """The kernel refused a request."""


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def text(kind: int, value: str) -> bytes:
    """An attribute that holds a string."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """An attribute that holds 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` from `offset` on, by type; of equal ones the last."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + (-length % 4)
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, body) of each message of one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            break
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += length + (-length % 4)


class Netlink:
    """A NETLINK_ROUTE socket for requests; the kernel answers within the call.

    A context manager.  One thread at a time.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def change(self, what: str, kind: int, body: bytes, flags: int = 0) -> None:
        """A request that changes something.

        Args:
            what: for the error's message: "tap1_kata up".

        Raises:
            NetlinkError: with the kernel's errno.
        """
        try:
            self._exchange(kind, body, NLM_F_ACK | flags)
        except OSError as error:
            raise NetlinkError(error.errno, f"{what}: {error.strerror}") from None

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all objects of a kind.

        Raises:
            OSError: with the kernel's errno; EINTR if the list changed on every try.
        """
        for _ in range(_TRIES):
            bodies, torn = self._exchange(kind, body, NLM_F_DUMP)
            if not torn:
                return bodies
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))

    def _exchange(self, kind: int, body: bytes, flags: int) -> tuple[list[bytes], bool]:
        self._sequence += 1
        length = _HEADER.size + len(body)
        head = _HEADER.pack(length, kind, NLM_F_REQUEST | flags, self._sequence, 0)
        self._socket.send(head + body)
        bodies: list[bytes] = []
        torn = False
        while True:
            for answer, answer_flags, sequence, content in messages(self._socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue
                torn = torn or bool(answer_flags & NLM_F_DUMP_INTR)
                if answer == NLMSG_DONE:
                    return bodies, torn
                if answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", content)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return bodies, torn
                bodies.append(content)


def monitor_socket(groups: int) -> socket.socket:
    """A non-blocking socket that becomes readable when something of `groups` changes."""
    found = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
    )
    try:
        found.bind((0, groups))
    except BaseException:
        found.close()
        raise
    return found


def drain(monitor: socket.socket) -> None:
    """Throw away what a monitor has to say; that it spoke is enough."""
    while True:
        try:
            monitor.recv(_BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # it lost some: all the same
                raise
