# SPDX-License-Identifier: Apache-2.0
"""QMP: the protocol by bytes, the client against a scripted peer."""

from __future__ import annotations

import itertools
import json
import os
import socket
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import VmmGoneError
from vmm.qemu.qmp import MAX_LINE, Event, Greeting, QmpConnection, QmpProtocolError, Reply
from vmm.qemu.qmp_client import QmpClient, QmpError

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"},'
    b' "capabilities": ["oob"]}}\r\n'
)
STREAM = (
    GREETING
    + b'{"return": {}, "id": 1}\r\n'
    + b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN",'
    + b' "data": {"guest": true, "reason": "guest-panic"}}\r\n'
    + b'{"id": 2, "error": {"class": "DeviceNotFound", "desc": "no"}}\r\n'
    + b'{"event": "STOP"}\r\n'
)
MESSAGES = [
    Greeting((7, 2, 22), "Debian"),
    Reply(1, value={}),
    Event("SHUTDOWN", {"guest": True, "reason": "guest-panic"}),
    Reply(2, error="no", error_class="DeviceNotFound"),
    Event("STOP", {}),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_any_cut_gives_the_same_messages(cuts: list[int]) -> None:
    connection = QmpConnection()
    edges = [0, *sorted(cuts), len(STREAM)]
    found: list[Any] = []
    for start, end in itertools.pairwise(edges):
        found += connection.receive_data(STREAM[start:end])
    assert found == MESSAGES


def test_commands_have_ids() -> None:
    connection = QmpConnection()
    first, data = connection.command("stop")
    second, more = connection.command("device_del", {"id": "d\n"})
    assert (first, second) == (1, 2)
    assert json.loads(data) == {"execute": "stop", "id": 1}
    assert more.count(b"\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[]\n",
        b"{}\n",
        b'{"QMP": 3}\n',
        b'{"return": {}}\n',
        b'{"id": "x", "return": {}}\n',
        b'{"id": 1, "error": 3}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b"x" * (MAX_LINE + 1),
    ],
)
def test_nonsense_is_a_protocol_error(line: bytes) -> None:
    with pytest.raises(QmpProtocolError):
        QmpConnection().receive_data(line)


@given(st.binary())
def test_nothing_else_is_raised(data: bytes) -> None:
    try:
        QmpConnection().receive_data(data + b"\n")
    except QmpProtocolError:
        return


class Peer:
    """QEMU's end: reads commands, answers what it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = trio.socket.from_stdlib_socket(sock)
        self.buffer = b""
        self.fds: list[int] = []

    async def greet(self) -> None:
        await self.socket.send(GREETING)
        assert (await self.command())["execute"] == "qmp_capabilities"
        await self.reply({"return": {}, "id": 1})

    async def command(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data, ancillary, _flags, _address = await self.socket.recvmsg(65536, 64)
            for _level, _kind, rights in ancillary:
                self.fds += memoryview(rights).cast("i").tolist()
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        command: dict[str, Any] = json.loads(line)
        return command

    async def reply(self, message: dict[str, Any]) -> None:
        await self.socket.send(json.dumps(message).encode() + b"\r\n")


async def test_client() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    events: list[Event] = []
    client = QmpClient(ours, events.append)
    answers: dict[str, Any] = {}

    async def ask(name: str) -> None:
        try:
            answers[name] = await client.execute(name)
        except QmpError as error:
            answers[name] = (error.error_class, str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        nursery.start_soon(ask, "first")  # sent before the greeting: it waits
        await peer.greet()
        assert client.greeting is None or client.greeting.version == (7, 2, 22)
        first = await peer.command()
        nursery.start_soon(ask, "second")
        second = await peer.command()
        await peer.reply({"event": "RESUME"})
        await peer.reply({"id": second["id"], "error": {"class": "GenericError", "desc": "no"}})
        await peer.reply({"id": 99, "return": "unasked"})
        await peer.reply({"id": first["id"], "return": 5})
        read_end, write_end = os.pipe()
        nursery.start_soon(lambda: client.execute("getfd", {"fdname": "x"}, fds=(write_end,)))
        getfd = await peer.command()
        await peer.reply({"id": getfd["id"], "return": {}})
        os.write(peer.fds[0], b"through")
        assert os.read(read_end, 10) == b"through"
        for fd in (read_end, write_end, *peer.fds):
            os.close(fd)
        peer.socket.close()
    assert answers == {"first": 5, "second": ("GenericError", "QEMU refused second: no")}
    assert events == [Event("RESUME", {})]
    with pytest.raises(VmmGoneError):
        await client.execute("stop")


@pytest.mark.parametrize("last_words", [b"", b"garbage\n"])
async def test_lost_peer_fails_who_waits(last_words: bytes) -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    client = QmpClient(ours, lambda event: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)

        async def ask() -> None:
            with pytest.raises(VmmGoneError):
                await client.execute("query-status")

        await peer.greet()
        for _ in range(3):
            nursery.start_soon(ask)
        for _ in range(3):
            await peer.command()
        await peer.socket.send(last_words)
        if not last_words:
            peer.socket.close()
        await client.wait_closed()
    peer.socket.close()


async def test_silent_peer_times_out() -> None:
    ours, theirs = socket.socketpair()
    client = QmpClient(ours, lambda event: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        with pytest.raises(QmpError, match="did not answer stop"):
            await client.execute("stop", timeout=0.05)
        theirs.close()
