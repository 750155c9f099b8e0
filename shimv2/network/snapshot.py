# SPDX-License-Identifier: Apache-2.0
"""What a network namespace holds at one moment."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass

from shimv2.network import netlink as nl

ARPHRD_ETHER = 1  # linux/if_arp.h
IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80  # linux/if.h
RTNH_F_ONLINK = 4  # linux/rtnetlink.h

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS = 1, 4, 5, 6, 7, 8
_RTA_TABLE = 15
_RTAX_MTU = 2
_NDA_DST, _NDA_LLADDR = 1, 2
_RT_TABLE_MAIN, _RTN_UNICAST, _RTPROT_KERNEL = 254, 1, 2
_NUD_PERMANENT = 0x80
_IPV6_METRIC = 1024  # the kernel's own choice for an IPv6 route without one
_LINK_LOCAL = b"\xfe\x80"

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True)
class Link:
    """An interface.

    Attributes:
        kind: "veth", "macvlan", …; "" for a physical one.
        mac: in hexadecimal with colons.
        master: index of the bridge or bond it is a port of, 0 for none.
    """

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    flags: int
    hardware: int = ARPHRD_ETHER
    master: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address of a link, with its prefix length."""

    link: int
    ip: str
    prefix: int


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route of the main table.

    Attributes:
        destination: ``10.0.0.0/24``, "" for the default route.
        gateway, source: "" for none.
        metric: 0 for the kernel's default.
    """

    link: int
    ipv6: bool
    destination: str
    gateway: str = ""
    source: str = ""
    scope: int = 0
    flags: int = 0
    mtu: int = 0
    metric: int = 0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent entry of the neighbour table."""

    link: int
    ip: str
    mac: str
    state: int
    flags: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """See the module's docstring."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()

    def addresses_of(self, link: int) -> tuple[Address, ...]:
        return tuple(address for address in self.addresses if address.link == link)

    def wired(self, *, kept: Container[int], ours: Container[int]) -> Snapshot:
        """The part that a VM has, with what belongs to it: Ethernet links that are up and no
        port of another one.

        Args:
            kept: indexes of links that it has already; these may be down.
            ours: indexes of links of our own, which it has not.
        """
        links = tuple(
            link
            for link in self.links
            if link.hardware == ARPHRD_ETHER
            and not link.flags & IFF_LOOPBACK
            and link.index not in ours
            and (link.index in kept or (link.flags & IFF_UP and not link.master))
        )
        known = {link.index for link in links}
        return Snapshot(
            links,
            tuple(a for a in self.addresses if a.link in known),
            tuple(r for r in self.routes if r.link in known),
            tuple(n for n in self.neighbours if n.link in known),
        )


def take(kernel: nl.Netlink) -> Snapshot:
    """Ask the kernel.

    Raises:
        OSError: it did not answer.
    """
    return Snapshot(
        tuple(map(_link, kernel.dump(nl.RTM_GETLINK, nl.LINK.pack(0, 0, 0, 0, 0)))),
        tuple(_addresses(kernel)),
        tuple(_routes(kernel)),
        tuple(_neighbours(kernel)),
    )


def _link(body: bytes) -> Link:
    _, hardware, index, flags, _ = nl.LINK.unpack_from(body)
    found = nl.attributes(body, nl.LINK.size)
    info = nl.attributes(found.get(_IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=_text(found.get(_IFLA_IFNAME, b"")),
        kind=_text(info.get(_IFLA_INFO_KIND, b"")),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(found.get(_IFLA_MTU)),
        flags=flags,
        hardware=hardware,
        master=_number(found.get(_IFLA_MASTER)),
    )


def _addresses(kernel: nl.Netlink) -> Iterator[Address]:
    for body in kernel.dump(nl.RTM_GETADDR, nl.ADDRESS.pack(0, 0, 0, 0, 0)):
        family, prefix, _, _, index = nl.ADDRESS.unpack_from(body)
        if family not in _FAMILIES:
            continue
        found = nl.attributes(body, nl.ADDRESS.size)
        # IFA_ADDRESS of a point-to-point link is the peer's.
        raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS, b"")
        if family == socket.AF_INET6 and raw.startswith(_LINK_LOCAL):
            continue  # the guest's kernel makes its own, the same for the same MAC
        yield Address(index, socket.inet_ntop(family, raw), prefix)


def _routes(kernel: nl.Netlink) -> Iterator[Route]:
    for family in _FAMILIES:
        try:
            bodies = kernel.dump(nl.RTM_GETROUTE, nl.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):  # a kernel without IPv6
                continue
            raise
        for body in bodies:
            if (route := _route(family, body)) is not None:
                yield route


def _route(wanted: int, body: bytes) -> Route | None:
    """None for what the guest's kernel makes by itself, and for what it can't be told."""
    family, length, _, _, table, protocol, scope, kind, flags = nl.ROUTE.unpack_from(body)
    found = nl.attributes(body, nl.ROUTE.size)
    table = _number(found.get(_RTA_TABLE)) or table
    if family != wanted or table != _RT_TABLE_MAIN or kind != _RTN_UNICAST:
        return None
    if protocol == _RTPROT_KERNEL or _RTA_OIF not in found:
        return None
    metric = _number(found.get(_RTA_PRIORITY))
    ipv6 = family == socket.AF_INET6
    return Route(
        link=_number(found[_RTA_OIF]),
        ipv6=ipv6,
        destination=f"{_ip(family, found.get(_RTA_DST))}/{length}" if length else "",
        gateway=_ip(family, found.get(_RTA_GATEWAY)),
        source=_ip(family, found.get(_RTA_PREFSRC)),
        scope=scope,
        flags=flags,
        mtu=_number(nl.attributes(found.get(_RTA_METRICS, b"")).get(_RTAX_MTU)),
        metric=0 if ipv6 and metric == _IPV6_METRIC else metric,
    )


def _neighbours(kernel: nl.Netlink) -> Iterator[Neighbour]:
    for body in kernel.dump(nl.RTM_GETNEIGH, nl.NEIGHBOUR.pack(0, 0, 0, 0, 0)):
        family, index, state, flags, _ = nl.NEIGHBOUR.unpack_from(body)
        if family not in _FAMILIES or not state & _NUD_PERMANENT:
            continue
        found = nl.attributes(body, nl.NEIGHBOUR.size)
        if _NDA_DST in found:
            yield Neighbour(
                index,
                _ip(family, found[_NDA_DST]),
                found.get(_NDA_LLADDR, b"").hex(":"),
                state,
                flags,
            )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def _number(raw: bytes | None) -> int:
    return int(struct.unpack("=I", raw)[0]) if raw is not None and len(raw) == 4 else 0


def _ip(family: int, raw: bytes | None) -> str:
    return socket.inet_ntop(family, raw) if raw else ""
