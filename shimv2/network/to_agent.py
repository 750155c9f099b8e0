# SPDX-License-Identifier: Apache-2.0
"""A snapshot as the messages of the agent's API."""

from __future__ import annotations

from agent.api import agent_pb2, types_pb2
from shimv2.network.snapshot import IFF_NOARP, RTNH_F_ONLINK, Link, Snapshot


def interface(link: Link, snapshot: Snapshot, pci_path: str) -> types_pb2.Interface:
    """A link with its addresses; `pci_path` is where the guest finds its NIC."""
    message = types_pb2.Interface(
        device=link.name,
        name=link.name,
        mtu=link.mtu,
        hwAddr=link.mac,
        devicePath=pci_path,
        type=link.kind,
        raw_flags=link.flags & IFF_NOARP,
    )
    for address in snapshot.addresses_of(link.index):
        message.IPAddresses.add(
            family=_family(":" in address.ip), address=address.ip, mask=str(address.prefix)
        )
    return message


def routes(snapshot: Snapshot) -> agent_pb2.Routes:
    """All routes: the agent takes a list as the whole."""
    names = {link.index: link.name for link in snapshot.links}
    message = agent_pb2.Routes()
    # Of several with one destination the agent keeps the last: it has to be the best.
    for route in sorted(snapshot.routes, key=lambda route: route.metric, reverse=True):
        message.Routes.add(
            dest=route.destination,
            gateway=route.gateway,
            device=names[route.link],
            source=route.source,
            scope=route.scope,
            family=_family(route.ipv6),
            flags=route.flags & RTNH_F_ONLINK,
            mtu=route.mtu,
            priority=route.metric,
        )
    return message


def neighbours(snapshot: Snapshot) -> agent_pb2.ARPNeighbors:
    """The permanent neighbours."""
    names = {link.index: link.name for link in snapshot.links}
    message = agent_pb2.ARPNeighbors()
    for neighbour in snapshot.neighbours:
        entry = message.ARPNeighbors.add(
            device=names[neighbour.link],
            lladdr=neighbour.mac,
            state=neighbour.state,
            flags=neighbour.flags,
        )
        entry.toIPAddress.family = _family(":" in neighbour.ip)
        entry.toIPAddress.address = neighbour.ip
    return message


def _family(ipv6: bool) -> types_pb2.IPFamily:
    return types_pb2.v6 if ipv6 else types_pb2.v4
