# SPDX-License-Identifier: Apache-2.0
"""Random guests and random hosts: whatever they do, the device goes on."""

from __future__ import annotations

import contextlib
import os
import random

import pytest
import trio

from vmm.vsock import VsockConnection, VsockRefused, wire
from vmm.vsock.tests.conftest import RigFactory, read_all
from vmm.vsock.tests.guest_model import BLOCK, Packet

ECHO, SOURCE = 1000, 1002


@pytest.mark.parametrize("seed", range(6))
async def test_a_guest_that_sends_anything(
    rig: RigFactory, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Packets at random, to connections that are and are not; then an honest one works."""
    chance = random.Random(seed)
    async with rig() as r:
        taken: list[VsockConnection] = []

        async def handler(connection: VsockConnection) -> None:
            taken.append(connection)
            await trio.sleep(chance.random() * 0.01)

        r.channel.listen(2000, handler)
        ports = [2000, 2001]
        for _ in range(400):
            kind = chance.choice([1, 1, 2, 3, 4, 5, 5, 5, 6, 7, chance.randrange(65536)])
            r.driver.transmit(
                Packet(
                    kind,
                    chance.randrange(4),
                    chance.choice(ports),
                    flags=chance.choice([0, 1, 2, 3, chance.getrandbits(32)]),
                    buf_alloc=chance.choice([0, 1, 5000, 1 << 18, chance.getrandbits(32)]),
                    fwd_cnt=chance.choice([0, 0, chance.getrandbits(32)]),
                    payload=os.urandom(chance.choice([0, 1, 100, 5000])),
                    length=chance.choice([None, None, None, chance.randrange(6000)]),
                    type=chance.choice([1] * 9 + [2]),
                )
            )
            r.driver.tx.kick()
            await r.settle()
            r.driver.receive()
        honest = Packet(wire.OP_REQUEST, 99, 2000)
        r.driver.send(honest)
        answers = await r.packets()
        while not any(p.op == wire.OP_RESPONSE and p.guest_port == 99 for p in answers):
            answers = await r.packets()
        assert r.channel.driver_up
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("seed", range(4))
async def test_hosts_that_come_and_go(
    rig: RigFactory, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams closed, half-closed, aborted, cancelled and left unread, at any moment; the data of
    those that are read to the end is right, and nothing remains."""
    chance = random.Random(seed)

    async def one() -> None:
        with contextlib.suppress(VsockRefused, trio.BrokenResourceError):
            port = chance.choice([ECHO, ECHO, ECHO, SOURCE, 9])
            connection = await r.channel.connect(port)
            end = chance.choice(["read", "read", "close", "abort", "cancel", "leave"])
            size = chance.choice([1, 1000, 50_000, 400_000])
            data = os.urandom(size) if port == ECHO else b"%d\n" % size
            expected = data if port == ECHO else (BLOCK * 7)[:size]
            async with connection, trio.open_nursery() as inner:

                async def send() -> None:
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await connection.stream.send_all(data)
                        await connection.stream.send_eof()

                inner.start_soon(send)
                if end == "read":
                    assert await read_all(connection.stream) == expected
                elif end == "close":
                    await connection.stream.receive_some(100)
                    await connection.aclose()
                elif end == "abort":
                    await trio.sleep(chance.random() * 0.01)
                    connection.abort()
                elif end == "cancel":
                    await trio.sleep(chance.random() * 0.01)
                inner.cancel_scope.cancel()

    async with rig() as r, r.guest():
        with trio.fail_after(30):
            for _ in range(6):
                async with trio.open_nursery() as nursery:
                    for _ in range(12):
                        nursery.start_soon(one)
        with trio.fail_after(5):
            while r.mux._links:
                await trio.sleep(0.005)
        assert not r.mux._by_fd
        assert not r.mux._owed
        assert r.mux._table._granted == 0
    assert "internal error" not in caplog.text
