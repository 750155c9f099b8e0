# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import socket
import struct

import pytest

from shimv2.network import netlink as nl
from shimv2.network.snapshot import ARPHRD_ETHER, IFF_LOOPBACK, IFF_UP, Address, Link, Snapshot


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


class Kernel:
    """A socket that answers as it is told."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def recv(self, _size: int) -> bytes:
        return self.answers.pop(0)

    def close(self) -> None:
        self.answers.clear()


@pytest.fixture
def netlink(monkeypatch: pytest.MonkeyPatch) -> nl.Netlink:
    monkeypatch.setattr(socket, "socket", lambda *_: Kernel())
    return nl.Netlink()


def answers(netlink: nl.Netlink, *datagrams: bytes) -> Kernel:
    kernel = netlink._socket
    assert isinstance(kernel, Kernel)
    kernel.answers = list(datagrams)
    return kernel


def test_attributes_are_padded_and_read_back() -> None:
    data = nl.text(3, "eth0") + nl.number(4, 1500) + nl.attribute(1 << 15 | 18, b"abc")
    assert len(data) % 4 == 0
    assert nl.attributes(data) == {3: b"eth0\0", 4: struct.pack("=I", 1500), 18: b"abc"}


@pytest.mark.parametrize("data", [b"", b"\1", struct.pack("=HH", 2, 7), struct.pack("=HH", 0, 7)])
def test_broken_attributes_end_the_list(data: bytes) -> None:
    assert nl.attributes(nl.number(1, 5) + data) == {1: struct.pack("=I", 5)}


def test_a_dump_comes_in_pieces(netlink: nl.Netlink) -> None:
    kernel = answers(
        netlink,
        message(16, b"one ", flags=2) + message(16, b"two ", flags=2),
        message(16, b"another one ", sequence=9) + message(16, b"six ", flags=2),
        message(nl.NLMSG_DONE, bytes(4)),
    )
    assert netlink.dump(nl.RTM_GETLINK, b"body") == [b"one ", b"two ", b"six "]
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", kernel.sent[0])
    assert (length, kind, flags) == (20, nl.RTM_GETLINK, nl.NLM_F_REQUEST | nl.NLM_F_DUMP)


def test_a_dump_that_changed_meanwhile_is_asked_for_again(netlink: nl.Netlink) -> None:
    answers(
        netlink,
        message(16, b"old ", flags=nl.NLM_F_DUMP_INTR) + message(nl.NLMSG_DONE, bytes(4)),
        message(16, b"new ", sequence=2) + message(nl.NLMSG_DONE, bytes(4), sequence=2),
    )
    assert netlink.dump(nl.RTM_GETLINK, b"") == [b"new "]


def test_a_refusal_names_what_was_done(netlink: nl.Netlink) -> None:
    answers(netlink, message(nl.NLMSG_ERROR, struct.pack("=i", -errno.ENODEV)))
    with pytest.raises(nl.NetlinkError, match="tap7 up: No such device") as caught:
        netlink.change("tap7 up", nl.RTM_NEWLINK, b"")
    assert caught.value.errno == errno.ENODEV


def test_an_acknowledgement_is_no_error(netlink: nl.Netlink) -> None:
    answers(netlink, message(nl.NLMSG_ERROR, struct.pack("=i", 0)))
    netlink.change("anything", nl.RTM_NEWLINK, b"")


def link(index: int, name: str, *, flags: int = IFF_UP, hardware: int = 1, master: int = 0) -> Link:
    return Link(index, name, "veth", "02:00:00:00:00:01", 1500, flags, hardware, master)


def names(found: Snapshot) -> list[str]:
    return [link.name for link in found.links]


def test_what_a_vm_can_have() -> None:
    found = Snapshot(
        (
            link(1, "lo", flags=IFF_UP | IFF_LOOPBACK, hardware=772),
            link(2, "eth0"),
            link(3, "down0", flags=0),
            link(4, "tunl0", hardware=768),
            link(5, "port0", master=6),
            link(6, "bridge0"),
            link(7, "tap2_kata"),
        ),
        (Address(1, "127.0.0.1", 8), Address(2, "10.0.0.2", 24)),
    )
    assert ARPHRD_ETHER == 1
    assert names(found.wired(kept=(), ours={7})) == ["eth0", "bridge0"]
    assert found.wired(kept=(), ours={7}).addresses == (Address(2, "10.0.0.2", 24),)
    assert names(found.wired(kept={3, 5}, ours={7})) == ["eth0", "down0", "port0", "bridge0"]
