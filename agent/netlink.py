# SPDX-License-Identifier: Apache-2.0
"""rtnetlink: messages of links, addresses, routes and neighbours over a plain socket.

Numbers are those of linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h and neighbour.h.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400

RTM_NEWLINK, RTM_GETLINK, RTM_SETLINK = 16, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO = 1, 3, 4, 18
IFLA_INFO_KIND = 1
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 6, 7, 8
RTA_TABLE = 15
RTAX_MTU = 2
NDA_DST, NDA_LLADDR = 1, 2

IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80
RT_TABLE_MAIN = 254
RTPROT_KERNEL, RTPROT_BOOT, RTPROT_STATIC = 2, 3, 4
RTN_UNICAST = 1
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
NUD_PERMANENT = 0x80
RTNH_F_ONLINK = 4

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
LINK = struct.Struct("=BxHiII")  # family, hardware type, index, flags, mask of flags to change
ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
ROUTE = struct.Struct(
    "=BBBBBBBBI"
)  # family, dst len, src len, tos, table, proto, scope, type, flags
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # the two upper bits tell of nesting and byte order


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(-length % 4)


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` from `offset` on, by type."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + (-length % 4)
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, sequence, body) of each message in one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            break
        yield kind, sequence, data[offset + _HEADER.size : offset + length]
        offset += length + (-length % 4)


class Netlink:
    """A NETLINK_ROUTE socket; the kernel answers within the call. A context manager."""

    def __init__(self) -> None:
        kind = _socket.SOCK_RAW | _socket.SOCK_CLOEXEC
        self._socket = _socket.socket(_socket.AF_NETLINK, kind, _socket.NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def change(self, kind: int, body: bytes, flags: int = 0) -> None:
        """A request that changes something. Raises OSError with the kernel's errno."""
        self._exchange(kind, body, NLM_F_ACK | flags)

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All objects of a kind: the bodies of the kernel's messages. Raises OSError."""
        return self._exchange(kind, body, NLM_F_DUMP)

    def _exchange(self, kind: int, body: bytes, flags: int) -> list[bytes]:
        self._sequence += 1
        head = _HEADER.pack(
            _HEADER.size + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0
        )
        self._socket.send(head + body)
        bodies: list[bytes] = []
        while True:
            for answer, sequence, content in messages(self._socket.recv(1 << 16)):
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_DONE:
                    return bodies
                if answer == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", content)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return bodies
                bodies.append(content)
