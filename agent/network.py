# SPDX-License-Identifier: Apache-2.0
"""Interfaces and neighbours of the sandbox as the host describes them."""

from __future__ import annotations

import _socket
import struct

from agent import netlink as nl
from agent import uevents
from agent.api import agent_pb2, types_pb2
from agent.links import (
    Link,
    family_name,
    links_of,
    parse_hardware,
    parse_ip,
    parse_prefix,
    rtnetlink,
)
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.waiting import Work

_IFNAMSIZ = 16
_FAMILIES = (_socket.AF_INET, _socket.AF_INET6)
_LINK_LOCAL = b"\xfe\x80"


class _Address:
    __slots__ = ("family", "index", "length", "raw", "scope")

    def __init__(self, family: int, length: int, raw: bytes, index: int = 0, scope: int = 0):
        self.family, self.length, self.raw, self.index = family, length, raw, index
        self.scope = scope

    def key(self) -> tuple[int, bytes]:
        return self.length, self.raw


# Interfaces


def list_interfaces() -> agent_pb2.Interfaces:
    """ListInterfaces: every link with its addresses."""
    with rtnetlink("list interfaces") as socket:
        addresses = _addresses(socket)
        found = [_interface(link, addresses) for link in links_of(socket)]
    return agent_pb2.Interfaces(Interfaces=found)


def update_interface(
    wanted: types_pb2.Interface, timeout: float = 3.0
) -> Work[types_pb2.Interface]:
    """UpdateInterface: give the link found by PCI path or hardware address its name and figures.

    With a devicePath the NIC is waited for up to `timeout` seconds. Raises INVALID_ARGUMENT,
    NOT_FOUND ("Link not found", which runtimes retry on), DEADLINE_EXCEEDED, INTERNAL.
    """
    if not wanted.name or len(wanted.name.encode()) >= _IFNAMSIZ or "/" in wanted.name:
        raise RpcError(Code.INVALID_ARGUMENT, f"interface name {wanted.name!r}")
    addresses = [_parse_address(address) for address in wanted.IPAddresses]
    hardware = parse_hardware(wanted.hwAddr, "hwAddr") if wanted.hwAddr else b""
    by_path = ""
    if wanted.devicePath:
        path = wanted.devicePath
        uevents.parse_pci_path(path)
        yield from uevents.wait_for(
            f"network device {path}",
            lambda: uevents.pci_net_name(path) is not None,
            timeout,
            "/sys/bus/pci/rescan",
        )
        by_path = uevents.pci_net_name(path) or ""
    elif not hardware:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"interface {wanted.name}: neither hwAddr nor devicePath given"
        )
    with rtnetlink(f"update interface {wanted.name}") as socket:
        links = links_of(socket)
        link = _find(links, by_path, hardware)
        if link is None:
            raise RpcError(
                Code.NOT_FOUND,
                f"Link not found: hwAddr {wanted.hwAddr!r} devicePath {wanted.devicePath!r}",
            )
        up = bool(link.flags & nl.IFF_UP)
        if link.name != wanted.name:
            for other in links:
                if other.name == wanted.name:  # two links that change places
                    _set_up(socket, other.index, False)
                    _rename(socket, other.index, f"{other.name[: _IFNAMSIZ - 6]}_tmp{other.index}")
            if up:
                _set_up(socket, link.index, False)
                up = False
            _rename(socket, link.index, wanted.name)
        if wanted.mtu and wanted.mtu != link.mtu:
            _set_link(socket, link.index, nl.attribute(nl.IFLA_MTU, struct.pack("=I", wanted.mtu)))
        _replace_addresses(socket, link.index, addresses)
        flags = nl.IFF_UP | (wanted.raw_flags & nl.IFF_NOARP)
        if not up or flags & nl.IFF_NOARP != link.flags & nl.IFF_NOARP:
            body = nl.LINK.pack(0, 0, link.index, flags, nl.IFF_UP | nl.IFF_NOARP)
            socket.change(nl.RTM_NEWLINK, body)
        answer = [found for found in links_of(socket) if found.index == link.index]
        if not answer:
            raise RpcError(Code.NOT_FOUND, f"Link not found: {wanted.name} has gone")
        return _interface(answer[0], _addresses(socket))


def _find(links: list[Link], name: str, hardware: bytes) -> Link | None:
    for link in links:
        if name and link.name == name:
            return link
        if not name and hardware and link.address == hardware:
            return link
    return None


def _set_link(socket: nl.Netlink, index: int, attributes: bytes) -> None:
    socket.change(nl.RTM_NEWLINK, nl.LINK.pack(0, 0, index, 0, 0) + attributes)


def _rename(socket: nl.Netlink, index: int, name: str) -> None:
    _set_link(socket, index, nl.attribute(nl.IFLA_IFNAME, name.encode() + b"\0"))


def _set_up(socket: nl.Netlink, index: int, up: bool) -> None:
    body = nl.LINK.pack(0, 0, index, nl.IFF_UP if up else 0, nl.IFF_UP)
    socket.change(nl.RTM_NEWLINK, body)


def _interface(link: Link, addresses: list[_Address]) -> types_pb2.Interface:
    answer = types_pb2.Interface(
        device=link.name,
        name=link.name,
        mtu=link.mtu,
        hwAddr=":".join(f"{byte:02x}" for byte in link.address),
        type=link.kind,
        raw_flags=link.flags,
    )
    for address in addresses:
        if address.index == link.index:
            answer.IPAddresses.add(
                family=family_name(address.family),
                address=_socket.inet_ntop(address.family, address.raw),
                mask=str(address.length),
            )
    return answer


# Addresses


def _addresses(socket: nl.Netlink) -> list[_Address]:
    found = []
    for body in socket.dump(nl.RTM_GETADDR, nl.ADDRESS.pack(0, 0, 0, 0, 0)):
        family, length, _, scope, index = nl.ADDRESS.unpack_from(body)
        if family not in _FAMILIES:
            continue
        attributes = nl.attributes(body, nl.ADDRESS.size)
        # Of a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL is ours where it exists.
        raw = attributes.get(nl.IFA_LOCAL) or attributes.get(nl.IFA_ADDRESS, b"")
        found.append(_Address(family, length, raw, index, scope))
    return found


def _replace_addresses(socket: nl.Netlink, index: int, wanted: list[_Address]) -> None:
    """Leave exactly `wanted` on a link, besides the link-local address the kernel makes itself."""
    present = [address for address in _addresses(socket) if address.index == index]
    keys = {address.key() for address in wanted}
    for address in present:
        by_kernel = address.family == _socket.AF_INET6 and address.raw.startswith(_LINK_LOCAL)
        if address.key() not in keys and not by_kernel:
            _change_address(socket, nl.RTM_DELADDR, index, address, 0)
    # Looked at again: the kernel drops the secondary addresses of a prefix with the first one.
    there = {address.key() for address in _addresses(socket) if address.index == index}
    for address in wanted:
        if address.key() not in there:
            there.add(address.key())
            flags = nl.NLM_F_CREATE | nl.NLM_F_REPLACE
            _change_address(socket, nl.RTM_NEWADDR, index, address, flags)


def _change_address(
    socket: nl.Netlink, kind: int, index: int, address: _Address, flags: int
) -> None:
    body = nl.ADDRESS.pack(address.family, address.length, 0, 0, index)
    body += nl.attribute(nl.IFA_LOCAL, address.raw) + nl.attribute(nl.IFA_ADDRESS, address.raw)
    if kind == nl.RTM_NEWADDR:
        if address.family == _socket.AF_INET6:
            # The host assigned it; a second spent on asking the neighbours would be the pod's.
            body += nl.attribute(nl.IFA_FLAGS, struct.pack("=I", nl.IFA_F_NODAD))
        elif address.length < 31:
            host_bits = (1 << (32 - address.length)) - 1
            broadcast = int.from_bytes(address.raw, "big") | host_bits
            body += nl.attribute(nl.IFA_BROADCAST, broadcast.to_bytes(4, "big"))
    socket.change(kind, body, flags)


def _parse_address(address: types_pb2.IPAddress) -> _Address:
    text, _, mask = address.address.partition("/")
    family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
    raw, length = parse_prefix(family, f"{text}/{address.mask or mask}", "IPAddresses")
    return _Address(family, length, raw)


# Neighbours


def add_arp_neighbors(neighbors: Iterable[types_pb2.ARPNeighbor]) -> None:
    """AddARPNeighbors. Raises INVALID_ARGUMENT, NOT_FOUND (the interface), INTERNAL."""
    with rtnetlink("add neighbours") as socket:
        indexes = {link.name: link.index for link in links_of(socket)}
        for neighbor in neighbors:
            text = neighbor.toIPAddress.address
            family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
            destination = parse_ip(family, text.partition("/")[0], "toIPAddress")
            if neighbor.device not in indexes:
                raise RpcError(
                    Code.NOT_FOUND, f"Link not found: device {neighbor.device!r} of {text}"
                )
            state = neighbor.state or nl.NUD_PERMANENT
            body = nl.NEIGHBOUR.pack(
                family, indexes[neighbor.device], state & 0xFFFF, neighbor.flags & 0xFF, 0
            )
            body += nl.attribute(nl.NDA_DST, destination)
            if neighbor.lladdr:
                hardware = parse_hardware(neighbor.lladdr, "lladdr")
                body += nl.attribute(nl.NDA_LLADDR, hardware)
            try:
                socket.change(nl.RTM_NEWNEIGH, body, nl.NLM_F_CREATE | nl.NLM_F_REPLACE)
            except OSError as error:
                raise RpcError(
                    Code.INTERNAL, f"neighbour {text} on {neighbor.device}: {error}"
                ) from error
