# SPDX-License-Identifier: Apache-2.0
"""What interfaces, routes and neighbours have in common: links, and addresses as texts."""

from __future__ import annotations

import _socket
import struct

from agent import netlink as nl
from agent.api import types_pb2
from ttrpc.errors import Code, RpcError


class Link:
    __slots__ = ("address", "flags", "index", "kind", "mtu", "name")

    def __init__(self, body: bytes) -> None:
        _, _, self.index, self.flags, _ = nl.LINK.unpack_from(body)
        found = nl.attributes(body, nl.LINK.size)
        self.name = found.get(nl.IFLA_IFNAME, b"").rstrip(b"\0").decode()
        self.mtu: int = struct.unpack("=I", found.get(nl.IFLA_MTU, bytes(4)))[0]
        self.address = found.get(nl.IFLA_ADDRESS, b"")
        info = nl.attributes(found.get(nl.IFLA_LINKINFO, b""))
        self.kind = info.get(nl.IFLA_INFO_KIND, b"").rstrip(b"\0").decode()


def links_of(socket: nl.Netlink) -> list[Link]:
    return [Link(body) for body in socket.dump(nl.RTM_GETLINK, nl.LINK.pack(0, 0, 0, 0, 0))]


class rtnetlink:
    """A netlink socket whose errors become INTERNAL, with what was being done."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._socket = nl.Netlink()

    def __enter__(self) -> nl.Netlink:
        return self._socket

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._socket.__exit__()
        if isinstance(error, OSError):
            raise RpcError(Code.INTERNAL, f"{self._doing}: {error}") from error


def family_name(family: int) -> types_pb2.IPFamily:
    return types_pb2.v6 if family == _socket.AF_INET6 else types_pb2.v4


def text_of(family: int, raw: bytes) -> str:
    return _socket.inet_ntop(family, raw) if raw else ""


def parse_ip(family: int, text: str, field: str) -> bytes:
    try:
        return _socket.inet_pton(family, text)
    except OSError:
        raise RpcError(Code.INVALID_ARGUMENT, f"{field} {text!r} is not an IP address") from None


def parse_prefix(family: int, text: str, field: str) -> tuple[bytes, int]:
    address, slash, length = text.partition("/")
    raw = parse_ip(family, address, field)
    bits = len(raw) * 8
    if slash and not (length.isdigit() and int(length) <= bits):
        raise RpcError(Code.INVALID_ARGUMENT, f"{field} {text!r}: prefix length")
    return raw, int(length) if slash else bits


def parse_hardware(text: str, field: str) -> bytes:
    try:
        raw = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        raw = b""
    if len(raw) * 3 - 1 != len(text):
        raise RpcError(Code.INVALID_ARGUMENT, f"{field} {text!r} is not a hardware address")
    return raw
