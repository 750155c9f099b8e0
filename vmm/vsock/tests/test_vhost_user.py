# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.vsock import vhost_user as vu


def message(request: int, payload: bytes = b"", flags: int = vu.VERSION) -> bytes:
    return vu.HEADER.pack(request, flags, len(payload)) + payload


def feed(parser: vu.Parser, data: bytes, pieces: list[int]) -> list[vu.Message]:
    """Read as the session does, at most `wanted`, in pieces of the given sizes."""
    found = []
    at = 0
    while at < len(data):
        size = min(pieces[at % len(pieces)], parser.wanted, len(data) - at)
        got = parser.receive(data[at : at + size])
        at += size
        if got is not None:
            found.append(got)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=80)), max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
)
def test_messages_survive_every_cut(messages: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(message(*m) for m in messages)
    found = feed(vu.Parser(), data, cuts)
    assert [(m.request, m.payload) for m in found] == messages


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_garbage_is_refused_or_parsed(data: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(vu.VhostUserError):
        for found in feed(vu.Parser(), data, cuts):
            for read in (found.u64, found.vring_state, found.vring_addr, found.regions,
                         found.region, found.config, found.take_fd):  # fmt: skip
                with contextlib.suppress(vu.VhostUserError):
                    read()


def test_descriptors_go_with_their_message() -> None:
    parser = vu.Parser()
    fd = os.open("/dev/null", os.O_RDONLY)
    first = message(vu.SET_VRING_KICK, struct.pack("<Q", 1))
    assert parser.receive(first[:12], [fd]) is None
    got = parser.receive(first[12:])
    assert got is not None
    assert got.fds == [fd]
    got.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    after = parser.receive(message(vu.GET_FEATURES))
    assert after is not None
    with pytest.raises(vu.VhostUserError, match="without its file descriptor"):
        after.take_fd()


def test_unfinished_message_leaves_no_descriptor() -> None:
    parser = vu.Parser()
    fd = os.open("/dev/null", os.O_RDONLY)
    parser.receive(b"\1", [fd])
    parser.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (message(1, flags=2), "flags"),
        (message(1, flags=vu.VERSION | vu.FLAG_REPLY), "flags"),
        (vu.HEADER.pack(5, vu.VERSION, vu.MAX_PAYLOAD + 1), "payload"),
        (bytes(13), "more bytes"),
    ],
)
def test_malformed(data: bytes, why: str) -> None:
    with pytest.raises(vu.VhostUserError, match=why):
        vu.Parser().receive(data)


def test_replies() -> None:
    assert vu.reply_u64(1, 7) == struct.pack("<IIIQ", 1, 5, 8, 7)
    assert vu.reply_vring_state(11, 1, 9) == struct.pack("<IIIII", 11, 5, 8, 1, 9)
    assert vu.reply_config(0, b"12345678") == (
        struct.pack("<IIIIII", 24, 5, 20, 0, 8, 0) + b"12345678"
    )
    assert vu.reply_config(0, b"") == struct.pack("<III", 24, 5, 0)
