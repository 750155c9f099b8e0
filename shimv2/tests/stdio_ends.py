# SPDX-License-Identifier: Apache-2.0
"""Both ends of a process's stdio for tests: what the guest sends, and what reads on the host."""

from __future__ import annotations

import os
import socket

import trio

from shimv2.stdio import Stdio


class SocketReader:
    """A guest stream whose bytes lie in a socket, as a vsock channel hands it out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    @property
    def fd(self) -> int | None:
        return self._sock.fileno()

    async def read(self, limit: int) -> bytes:
        raise AssertionError("a stream with a descriptor is spliced")

    async def delivered(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        await trio.lowlevel.checkpoint()


class RpcReader:
    """A guest stream read call by call."""

    fd = None

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[bytes](100)

    async def read(self, limit: int) -> bytes:
        try:
            return await self.receive.receive()
        except trio.EndOfChannel:
            return b""

    async def delivered(self) -> None:
        """A call returns what there is."""

    async def aclose(self) -> None:
        self.receive.close()


class Collector:
    """A guest's stdin."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.data = b""
        self.ended = trio.Event()
        self.grew = trio.Event()
        self._refuse = refuse

    async def write(self, data: bytes) -> None:
        if self._refuse:
            raise trio.BrokenResourceError
        self.data += data
        self.grew.set()
        self.grew = trio.Event()

    async def aclose(self) -> None:
        self.ended.set()

    async def until(self, wanted: bytes) -> None:
        while self.data != wanted:
            await self.grew.wait()


def make(stdin: str = "", stdout: str = "", stderr: str = "", *, terminal: bool = False) -> Stdio:
    return Stdio(
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        terminal=terminal,
        container_id="web",
        namespace="default",
    )


def guest_stream() -> tuple[socket.socket, SocketReader]:
    guest, host = socket.socketpair()
    guest.setblocking(False)
    return guest, SocketReader(host)


async def send(guest: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[guest.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(guest)


async def receive(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            chunk = os.read(fd, size - len(data))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)
            continue
        assert chunk, "end of the fifo"
        data += chunk
    return data
