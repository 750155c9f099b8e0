# SPDX-License-Identifier: Apache-2.0
"""A device of ours with the model of a guest at its other end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from vmm.vsock import VhostUserChannel, VsockConnection, wire
from vmm.vsock.tests.guest_model import SERVICES, Guest, Packet, RingDriver


class Rig:
    """A running channel and the driver of its guest."""

    def __init__(self, channel: VhostUserChannel, driver: RingDriver) -> None:
        self.channel = channel
        self.driver = driver
        self.mux = channel._mux

    async def packets(self, count: int = 1) -> list[Packet]:
        """Wait for this many packets of the device; a second is plenty."""
        found: list[Packet] = []
        with trio.fail_after(1):
            while True:
                self.driver.reclaim()
                found += self.driver.receive()
                more = self.driver.rx.want_call() | self.driver.tx.want_call()
                if len(found) >= count:
                    return found
                if not more:
                    await trio.lowlevel.wait_readable(self.driver.rx.call_fd)
                    os.eventfd_read(self.driver.rx.call_fd)

    async def settle(self) -> None:
        """Return when the device has dealt with all that the driver has offered."""
        with trio.fail_after(5):
            while self.driver.tx.u16(self.driver.tx.used + 2) != self.driver.tx.avail_idx:
                await trio.lowlevel.checkpoint()
        self.driver.reclaim()

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a part of the vhost-user session, which blocks."""
        return await trio.to_thread.run_sync(partial(function, *args))

    @asynccontextmanager
    async def guest(self, buf_alloc: int = 256 << 10) -> AsyncIterator[Guest]:
        """Let the model's kernel and services run."""
        guest = Guest(self.driver, SERVICES, buf_alloc)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, guest)
            yield guest
            nursery.cancel_scope.cancel()

    async def _run(self, guest: Guest) -> None:
        async def watch(fd: int) -> None:
            while True:
                await trio.lowlevel.wait_readable(fd)
                os.eventfd_read(fd)
                guest.step()

        guest.step()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, self.driver.rx.call_fd)
            nursery.start_soon(watch, self.driver.tx.call_fd)


RigFactory = Callable[..., AbstractAsyncContextManager[Rig]]


@pytest.fixture
def rig(tmp_path: Path) -> RigFactory:
    @asynccontextmanager
    async def make(*, start: bool = True, **options: Any) -> AsyncIterator[Rig]:
        before = set(os.listdir("/proc/self/fd"))
        path = tmp_path / "vsock.sock"
        async with VhostUserChannel(path) as channel:
            driver = RingDriver(**options)
            try:
                rig = Rig(channel, driver)
                assert await rig.call(driver.connect, path) == 3
                if start:
                    await rig.call(driver.start)
                yield rig
            finally:
                driver.close()
        assert not path.exists()
        left = {fd for fd in set(os.listdir("/proc/self/fd")) - before if _exists(fd)}
        assert not left, f"descriptors left: {[os.readlink(f'/proc/self/fd/{f}') for f in left]}"

    return make


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = bytearray()
    while part := await stream.receive_some(65536):
        data += part
    return bytes(data)


async def accepted(rig: Rig, port: int = 7) -> tuple[VsockConnection, int]:
    """A connection that the bare driver has accepted; and its host port."""
    made: list[VsockConnection] = []

    async def connect() -> None:
        made.append(await rig.channel.connect(port))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        (request,) = await rig.packets()
        assert request.op == wire.OP_REQUEST
        rig.driver.send(Packet(wire.OP_RESPONSE, port, request.host_port))
    assert made[0].host_port == request.host_port
    return made[0], request.host_port
