# SPDX-License-Identifier: Apache-2.0
"""Every kind of channel but the vhost-user device, which has tests of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vmm.errors import CapacityError, UnsupportedError, VmmConfigError, VmmGoneError
from vmm.hypervisor import SerialDevice, VsockDevice
from vmm.vsock import (
    HybridChannel,
    SerialChannel,
    VhostChannel,
    VhostUserChannel,
    VsockConnection,
    VsockNoAnswer,
    VsockRefused,
    hybrid_server,
    open_channel,
    vhost,
)
from vmm.vsock.tests.conftest import RigFactory, read_all

# --- the choice -------------------------------------------------------------------------------


def test_auto_takes_the_kernels_device_where_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vhost, "available", lambda: True)
    assert isinstance(open_channel("auto", tmp_path), VhostChannel)
    monkeypatch.setattr(vhost, "available", lambda: False)
    assert isinstance(open_channel("auto", tmp_path), VhostUserChannel)


def test_kinds(tmp_path: Path) -> None:
    assert open_channel("vhost-user", tmp_path, cid=7).device == VsockDevice(
        id="vsock0", cid=7, socket=tmp_path / "vsock.sock"
    )
    assert open_channel("hybrid", tmp_path, cid=7).device == VsockDevice(id="vsock0", cid=7)
    serial = open_channel("serial", tmp_path).device
    assert serial == SerialDevice(
        id="agent0", name="agent.channel.0", socket=tmp_path / "agent.sock"
    )
    with pytest.raises(VmmConfigError, match="pigeon"):
        open_channel("pigeon", tmp_path)
    with pytest.raises(ValueError, match="CID"):
        open_channel("vhost-user", tmp_path, cid=2)


def test_available(tmp_path: Path) -> None:
    assert not vhost.available(tmp_path / "nothing")
    (tmp_path / "device").touch()
    assert vhost.available(tmp_path / "device")


async def test_the_blocks_own_error_comes_out_unwrapped(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with open_channel("vhost-user", tmp_path):
            raise KeyError("mine")
    assert not (tmp_path / "vsock.sock").exists()
    with trio.move_on_after(0.01) as scope:
        async with open_channel("vhost-user", tmp_path):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not (tmp_path / "vsock.sock").exists()


async def test_a_socket_that_can_not_be_made(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "x", tmp_path / ("x" * 120)):
        with pytest.raises(VmmConfigError, match=path.name):
            async with VhostUserChannel(path):
                pass
    (tmp_path / "mine").write_text("not yours")
    with pytest.raises(VmmConfigError, match="in use"):
        async with VhostUserChannel(tmp_path / "mine"):
            pass
    assert (tmp_path / "mine").read_text() == "not yours"


# --- the kernel's vhost-vsock, with the kernel played by the test ------------------------------


class FakeSocket:
    """Connects to nothing, or fails as told."""

    def __init__(self, error: int | None) -> None:
        self.error = error
        self.closed = False
        self.address: tuple[int, int] | None = None
        self.ours, self.theirs = socket.socketpair()

    def __call__(self) -> trio.socket.SocketType:
        made = trio.socket.from_stdlib_socket(self.ours)
        fake = self

        class Wrapped(type(made)):  # type: ignore[misc]
            async def connect(self, address: tuple[int, int]) -> None:
                await trio.lowlevel.checkpoint()
                fake.address = address
                if fake.error == -1:
                    await trio.sleep_forever()
                if fake.error is not None:
                    raise OSError(fake.error, os.strerror(fake.error))

            def getsockname(self) -> tuple[int, int]:
                return (2, 4242)

        made.__class__ = Wrapped
        return made


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "vhost-vsock").touch()
    return tmp_path / "vhost-vsock"


async def test_vhost_takes_the_first_free_cid(node: Path) -> None:
    asked: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        assert request == 0x4008AF60
        asked.append(struct.unpack("=Q", argument)[0])
        if len(asked) < 3:
            raise OSError(errno.EADDRINUSE, "in use")
        return 0

    fake = FakeSocket(None)
    async with VhostChannel(node, ioctl=ioctl, make_socket=fake) as channel:
        assert channel.device.cid == asked[2]
        assert 3 <= channel.device.cid < 0x7FFF_FFFF
        fd = channel.device.vhost_fd
        assert fd is not None
        os.fstat(fd)
        connection = await channel.connect(1024)
        assert fake.address == (asked[2], 1024)
        assert connection.host_port == 4242
        await connection.stream.send_all(b"hi")
        assert fake.theirs.recv(10) == b"hi"
        await connection.aclose()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_no_free_cid_is_an_error() -> None:
    def busy(fd: int, request: int, argument: bytes) -> int:
        raise OSError(errno.EADDRINUSE, "in use")

    def old(fd: int, request: int, argument: bytes) -> int:
        raise OSError(errno.ENOTTY, "not a vhost device")

    with pytest.raises(CapacityError, match="all in use"):
        vhost.claim_cid(0, busy)
    with pytest.raises(UnsupportedError, match="not a vhost device"):
        vhost.claim_cid(0, old)


async def test_vhost_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="No such file"):
        async with VhostChannel(tmp_path / "none"):
            pass


@pytest.mark.parametrize(
    ("error", "silent"),
    [(errno.ECONNRESET, False), (errno.ENODEV, False), (errno.ETIMEDOUT, True), (-1, True)],
)
async def test_vhost_refusals(
    node: Path, error: int, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vhost, "CONNECT_TIMEOUT", 0.02)
    fake = FakeSocket(error)
    async with VhostChannel(node, ioctl=lambda *a: 0, make_socket=fake) as channel:
        with pytest.raises(VsockRefused) as refusal:
            await channel.connect(1024)
        assert isinstance(refusal.value, VsockNoAnswer) is silent
        assert fake.ours.fileno() == -1


async def test_vhost_retries_until_the_guest_listens(node: Path) -> None:
    attempts = 0

    def make() -> trio.socket.SocketType:
        nonlocal attempts
        attempts += 1
        return FakeSocket(errno.ECONNRESET if attempts < 4 else None)()

    async with VhostChannel(node, ioctl=lambda *a: 0, make_socket=make) as channel:
        with trio.fail_after(2):
            connection = await channel.connect_when_ready(1024, 10)
        assert attempts == 4
        await connection.aclose()


async def test_vhost_other_errors_are_not_hidden(node: Path) -> None:
    fake = FakeSocket(errno.EACCES)
    async with VhostChannel(node, ioctl=lambda *a: 0, make_socket=fake) as channel:
        with pytest.raises(PermissionError):
            await channel.connect(1024)


async def test_mark_gone_ends_attempts(node: Path) -> None:
    fake = FakeSocket(-1)
    async with VhostChannel(node, ioctl=lambda *a: 0, make_socket=fake) as channel:
        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:

                async def attempt() -> None:
                    with pytest.raises(VmmGoneError, match="panic"):
                        await channel.connect_when_ready(1024, 60)

                nursery.start_soon(attempt)
                await trio.testing.wait_all_tasks_blocked()
                channel.mark_gone("guest panic")
        with pytest.raises(VmmGoneError, match="panic"):
            await channel.connect(1024)


# --- hybrid -----------------------------------------------------------------------------------


@asynccontextmanager
async def hybrid_vmm(path: Path) -> AsyncIterator[list[bytes]]:
    """A VMM's socket: port 1024 echoes, the rest is refused."""
    seen: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            line = await stream.receive_some(100)
            seen.append(line)
            if line == b"CONNECT 1024\n":
                # The answer and the first bytes of the stream come at once.
                await stream.send_all(b"OK 1073741824\nhello")
                while data := await stream.receive_some(100):
                    await stream.send_all(data)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        server = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        await nursery.start(trio.serve_listeners, serve, [server])
        yield seen
        nursery.cancel_scope.cancel()


async def test_hybrid_client(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    async with hybrid_vmm(path) as seen, HybridChannel(path, 3) as channel:
        connection = await channel.connect(1024)
        assert connection.host_port == 1 << 30
        assert await connection.stream.receive_some(5) == b"hello"
        with trio.fail_after(1):
            await connection.delivered()
        await connection.aclose()
        with pytest.raises(VsockRefused, match="closed during"):
            await channel.connect(9)
        assert seen == [b"CONNECT 1024\n", b"CONNECT 9\n"]


async def test_hybrid_waits_for_the_vmms_socket(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    async with HybridChannel(path, 3) as channel:
        with pytest.raises(VsockRefused):
            await channel.connect(1024)
        with trio.fail_after(2):
            async with trio.open_nursery() as nursery:

                async def attempt() -> None:
                    await (await channel.connect_when_ready(1024, 10)).aclose()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(attempt)
                await trio.sleep(0.02)
                async with hybrid_vmm(path):
                    await trio.sleep_forever()


async def test_hybrid_takes_no_connections_from_the_guest(tmp_path: Path) -> None:
    async def handler(connection: VsockConnection) -> None: ...

    async with HybridChannel(tmp_path / "x", 3) as channel:
        with pytest.raises(UnsupportedError):
            channel.listen(1, handler)


async def test_serve_hybrid(rig: RigFactory, tmp_path: Path) -> None:
    """Our own server, with our own client and the device between them."""
    path = tmp_path / "hybrid.sock"
    async with rig() as r, r.guest():
        await r.channel.serve_hybrid(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with HybridChannel(path, 3) as client:
            async with await client.connect(1000) as connection:
                assert connection.host_port >= 1 << 30
                await connection.stream.send_all(b"through it all")
                await connection.stream.send_eof()
                assert await read_all(connection.stream) == b"through it all"
            with pytest.raises(VsockRefused):
                await client.connect(9)
    assert not path.exists()


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"x" * 100, b"CONNECT 99999999999\n"])
async def test_serve_hybrid_refuses_silently(rig: RigFactory, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "hybrid.sock"
    async with rig() as r:
        await r.channel.serve_hybrid(path)
        async with await trio.open_unix_socket(os.fspath(path)) as stream:
            await stream.send_all(line)
            with trio.fail_after(1):
                # Broken if it closed with some of the line unread.
                with contextlib.suppress(trio.BrokenResourceError):
                    assert await stream.receive_some(1) == b""


async def test_serve_hybrid_waits_only_so_long(
    rig: RigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid_server, "HANDSHAKE_TIMEOUT", 0.02)
    path = tmp_path / "hybrid.sock"
    async with rig() as r:
        await r.channel.serve_hybrid(path)
        async with await trio.open_unix_socket(os.fspath(path)) as stream:
            with trio.fail_after(1):
                assert await stream.receive_some(1) == b""


# --- virtio-serial ----------------------------------------------------------------------------


async def test_serial_is_one_stream_for_the_agent(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    async with hybrid_vmm(path), SerialChannel(path) as channel:
        with pytest.raises(VsockRefused, match="no port 1027"):
            await channel.connect(1027)
        first = await channel.connect(1024)
        with pytest.raises(VsockRefused, match="in use"):
            await channel.connect(1024)
        await first.aclose()
        second = await channel.connect(1024)
        await second.stream.send_all(b"CONNECT 1024\n")
        assert (await second.stream.receive_some(100)).startswith(b"OK")
        await second.stream.aclose()
        await (await channel.connect(1024)).aclose()


async def test_serial_without_a_vmm(tmp_path: Path) -> None:
    async with SerialChannel(tmp_path / "none") as channel:
        with pytest.raises(VsockRefused, match="none"):
            await channel.connect(1024)
