# SPDX-License-Identifier: Apache-2.0
"""Routes of the sandbox: the main tables, made equal to the host's list."""

from __future__ import annotations

import _socket
import errno
import struct

from agent import netlink as nl
from agent.api import agent_pb2, types_pb2
from agent.links import family_name, links_of, parse_ip, parse_prefix, rtnetlink, text_of
from ttrpc.errors import Code, RpcError

_IPV6_PRIORITY = 1024  # the kernel's own choice for an IPv6 route without one
_FAMILIES = (_socket.AF_INET, _socket.AF_INET6)


class _Route:
    """A route of the main table; `destination` empty is the default route."""

    __slots__ = (
        "destination", "family", "flags", "gateway", "index", "length", "mtu", "priority",
        "protocol", "scope", "source",
    )  # fmt: skip

    def __init__(self, family: int) -> None:
        self.family = family
        self.length = 0
        self.destination = b""
        self.gateway = b""
        self.source = b""
        self.index = 0
        self.scope = 0
        self.flags = 0
        self.mtu = 0
        self.priority = 0
        self.protocol = nl.RTPROT_STATIC

    def key(self) -> tuple[object, ...]:
        """What makes two routes the same one for UpdateRoutes."""
        return (
            self.family, self.length, self.destination, self.gateway, self.index, self.mtu,
            self.source, self.priority,
        )  # fmt: skip


def list_routes() -> agent_pb2.Routes:
    """ListRoutes: the main tables of IPv4 and IPv6."""
    with rtnetlink("list routes") as socket:
        return _routes_message(socket)


def update_routes(wanted: agent_pb2.Routes) -> agent_pb2.Routes:
    """UpdateRoutes: make the main tables hold `wanted`, besides what the kernel put there.

    Raises INVALID_ARGUMENT, NOT_FOUND (an interface), INTERNAL naming the route refused.
    """
    with rtnetlink("update routes") as socket:
        indexes = {link.name: link.index for link in links_of(socket)}
        routes = [_parse_route(route, indexes) for route in wanted.Routes]
        keys = {route.key() for route in routes}
        by_kernel = set()
        for old in _routes(socket):
            if old.protocol == nl.RTPROT_KERNEL:
                by_kernel.add(old.key())
            elif old.key() not in keys:
                try:
                    socket.change(nl.RTM_DELROUTE, _route_body(old))
                except OSError as error:
                    if error.errno != errno.ESRCH:  # it went with another one
                        raise
        _add_routes(socket, [route for route in routes if route.key() not in by_kernel])
        return _routes_message(socket)


def _add_routes(socket: nl.Netlink, routes: list[_Route]) -> None:
    """Add routes, those to a link first; one whose gateway isn't reachable yet waits its turn."""
    pending = sorted(routes, key=lambda route: bool(route.gateway))
    while pending:
        failed: list[tuple[_Route, OSError]] = []
        for route in pending:
            try:
                socket.change(
                    nl.RTM_NEWROUTE, _route_body(route), nl.NLM_F_CREATE | nl.NLM_F_REPLACE
                )
            except OSError as error:
                failed.append((route, error))
        if len(failed) == len(pending):
            refused, reason = failed[0]
            raise RpcError(Code.INTERNAL, f"route {_describe(refused)}: {reason}") from reason
        pending = [route for route, _ in failed]


def _routes_message(socket: nl.Netlink) -> agent_pb2.Routes:
    names = {link.index: link.name for link in links_of(socket)}
    answer = agent_pb2.Routes()
    for route in _routes(socket):
        answer.Routes.add(
            dest=_prefix(route),
            gateway=text_of(route.family, route.gateway),
            device=names.get(route.index, ""),
            source=text_of(route.family, route.source),
            scope=route.scope,
            family=family_name(route.family),
            flags=route.flags,
            mtu=route.mtu,
            priority=route.priority,
        )
    return answer


def _routes(socket: nl.Netlink) -> list[_Route]:
    found = []
    for family in _FAMILIES:
        try:
            bodies = socket.dump(nl.RTM_GETROUTE, nl.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):  # a kernel without IPv6
                continue
            raise
        for body in bodies:
            route = _read_route(body)
            if route is not None and route.family == family:
                found.append(route)
    return found


def _read_route(body: bytes) -> _Route | None:
    """A unicast route of the main table; None for any other."""
    family, length, _, _, table, protocol, scope, kind, flags = nl.ROUTE.unpack_from(body)
    attributes = nl.attributes(body, nl.ROUTE.size)
    if nl.RTA_TABLE in attributes:
        table = struct.unpack("=I", attributes[nl.RTA_TABLE])[0]
    if table != nl.RT_TABLE_MAIN or kind != nl.RTN_UNICAST:
        return None
    route = _Route(family)
    route.length = length
    route.destination = attributes.get(nl.RTA_DST, b"") if length else b""
    route.gateway = attributes.get(nl.RTA_GATEWAY, b"")
    route.source = attributes.get(nl.RTA_PREFSRC, b"")
    route.index = struct.unpack("=I", attributes.get(nl.RTA_OIF, bytes(4)))[0]
    route.priority = struct.unpack("=I", attributes.get(nl.RTA_PRIORITY, bytes(4)))[0]
    if family == _socket.AF_INET6 and route.priority == _IPV6_PRIORITY:
        route.priority = 0
    metrics = nl.attributes(attributes.get(nl.RTA_METRICS, b""))
    route.mtu = struct.unpack("=I", metrics.get(nl.RTAX_MTU, bytes(4)))[0]
    route.scope, route.flags, route.protocol = scope, flags, protocol
    return route


def _route_body(route: _Route) -> bytes:
    body = nl.ROUTE.pack(
        route.family,
        route.length,
        0,
        0,
        nl.RT_TABLE_MAIN,
        route.protocol,
        route.scope,
        nl.RTN_UNICAST,
        route.flags & nl.RTNH_F_ONLINK,
    )
    if route.length:
        body += nl.attribute(nl.RTA_DST, route.destination)
    if route.gateway:
        body += nl.attribute(nl.RTA_GATEWAY, route.gateway)
    if route.source:
        body += nl.attribute(nl.RTA_PREFSRC, route.source)
    if route.index:
        body += nl.attribute(nl.RTA_OIF, struct.pack("=I", route.index))
    if route.priority:
        body += nl.attribute(nl.RTA_PRIORITY, struct.pack("=I", route.priority))
    if route.mtu:
        metrics = nl.attribute(nl.RTAX_MTU, struct.pack("=I", route.mtu))
        body += nl.attribute(nl.RTA_METRICS, metrics)
    return body


def _parse_route(route: types_pb2.Route, indexes: dict[str, int]) -> _Route:
    family = _socket.AF_INET6 if route.family == types_pb2.v6 else _socket.AF_INET
    if ":" in route.dest or ":" in route.gateway:
        family = _socket.AF_INET6
    answer = _Route(family)
    if route.dest not in ("", "default"):
        answer.destination, answer.length = parse_prefix(family, route.dest, "dest")
        if answer.length == 0:
            answer.destination = b""
    if route.gateway:
        answer.gateway = parse_ip(family, route.gateway, "gateway")
    if route.source:
        answer.source = parse_ip(family, route.source, "source")
    if route.device:
        if route.device not in indexes:
            raise RpcError(
                Code.NOT_FOUND, f"Link not found: device {route.device!r} of route {route.dest!r}"
            )
        answer.index = indexes[route.device]
    elif not route.gateway:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"route {route.dest!r} has neither gateway nor device"
        )
    if route.scope > 255:
        raise RpcError(Code.INVALID_ARGUMENT, f"route {route.dest!r}: scope {route.scope}")
    if family == _socket.AF_INET:
        # Without a gateway the destination is on the link; gateways in it need it to say so.
        link = nl.RT_SCOPE_LINK if not route.gateway else nl.RT_SCOPE_UNIVERSE
        answer.scope = route.scope or link
    answer.flags = route.flags
    answer.mtu = route.mtu
    answer.priority = route.priority
    return answer


def _prefix(route: _Route) -> str:
    """`10.0.0.0/24`; empty for the default route."""
    if not route.length:
        return ""
    return f"{_socket.inet_ntop(route.family, route.destination)}/{route.length}"


def _describe(route: _Route) -> str:
    text = _prefix(route) or "default"
    if route.gateway:
        text += f" via {text_of(route.family, route.gateway)}"
    return text
