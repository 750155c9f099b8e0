# SPDX-License-Identifier: Apache-2.0
"""The vhost-user-vsock device against a guest, or a front end, that lies."""

from __future__ import annotations

import os
import struct

import pytest
import trio

from vmm.errors import VmmGoneError
from vmm.vsock import VsockRefused, mux, wire
from vmm.vsock import vhost_user as vu
from vmm.vsock.tests.conftest import Rig, RigFactory, accepted
from vmm.vsock.tests.guest_model import Packet

ECHO, SINK, SOURCE = 1000, 1001, 1002


LIES = {
    "length over the packet": Packet(wire.OP_RW, 7, 0, payload=b"abc", length=4096),
    "length without payload": Packet(wire.OP_RW, 7, 0, length=1),
    "unknown op": Packet(99, 7, 0),
    "op 0": Packet(0, 7, 0),
    "second response": Packet(wire.OP_RESPONSE, 7, 0),
    "request for a connection that is": Packet(wire.OP_REQUEST, 7, 0),
    "shutdown of nothing": Packet(wire.OP_SHUTDOWN, 7, 0),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_costs_its_connection_only(rig: RigFactory, name: str) -> None:
    async with rig() as r:
        connection, port = await accepted(r)
        other, other_port = await accepted(r, 8)
        lie = LIES[name]
        lie.host_port = port
        r.driver.send(lie)
        assert (await r.packets())[0].op == wire.OP_RST
        assert await connection.stream.receive_some(1) == b""
        r.driver.send(Packet(wire.OP_RW, 8, other_port, payload=b"fine"))
        assert await other.stream.receive_some(10) == b"fine"
        await connection.aclose()
        await other.aclose()


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (Packet(wire.OP_RW, 7, 1, payload=b"to nobody"), wire.OP_RST),
        (Packet(wire.OP_REQUEST, 7, 1, type=2), wire.OP_RST),
        (Packet(wire.OP_REQUEST, 7, 1, host_cid=9), wire.OP_RST),
        (Packet(wire.OP_REQUEST, 7, 1, cid=4), None),
        (Packet(wire.OP_RST, 7, 1), None),
    ],
)
async def test_packets_to_nobody(rig: RigFactory, packet: Packet, answer: int | None) -> None:
    async with rig() as r:
        connection, port = await accepted(r)
        r.driver.send(packet, Packet(wire.OP_CREDIT_REQUEST, 7, port))
        ops = [p.op for p in await r.packets(1 if answer is None else 2)]
        assert ops == ([] if answer is None else [answer]) + [wire.OP_CREDIT_UPDATE]
        await connection.aclose()


async def test_payload_longer_than_the_header_says_is_cut(rig: RigFactory) -> None:
    async with rig() as r:
        connection, port = await accepted(r)
        r.driver.send(Packet(wire.OP_RW, 7, port, payload=b"abcdef", length=3))
        assert await connection.stream.receive_some(10) == b"abc"
        await connection.aclose()


async def test_floods_of_nonsense_wait_for_receive_buffers(rig: RigFactory) -> None:
    """A guest that makes us owe resets and takes none gets no memory of ours for it."""
    async with rig(queue_size=16) as r:
        for _ in range(200):
            while r.driver.tx_free:
                r.driver.transmit(Packet(wire.OP_RW, 1, 1))
            r.driver.tx.kick(force=True)
            await trio.sleep(0)
            r.driver.reclaim()
        assert len(r.mux._replies) <= mux.MAX_REPLIES
        # It goes on as soon as buffers come.
        for _ in range(200):
            await trio.sleep(0)
            r.driver.reclaim()
            if not r.driver.receive() and not r.mux._replies:
                break
        assert not r.mux._replies


def break_ring(rig: Rig, how: str) -> None:
    tx, rx = rig.driver.tx, rig.driver.rx
    match how:
        case "index jumps":
            tx.set_u16(tx.available + 2, (tx.avail_idx + 1000) & 0xFFFF)
        case "descriptor loop":
            tx.describe(0, 0x1000, 44, 1, 0)
            tx.offer(0)
        case "address outside":
            tx.describe(0, 1 << 50, 44, 0, 0)
            tx.offer(0)
        case "tiny receive buffers":
            for index in range(rx.size):
                rx.describe(index, 0x1000, 4, 2, 0)
            tx.describe(0, 0x1000, 44, 0, 0)
            rig.driver.transmit(Packet(wire.OP_CREDIT_REQUEST, 7, rig.port))  # type: ignore[attr-defined]
            tx.kick()
    os.eventfd_write(tx.kick_fd, 1)
    if how in ("descriptor loop", "address outside"):
        tx.kick(force=True)


@pytest.mark.parametrize(
    "how", ["index jumps", "descriptor loop", "address outside", "tiny receive buffers"]
)
async def test_a_broken_ring_resets_the_device_only(rig: RigFactory, how: str) -> None:
    async with rig() as r:
        connection, port = await accepted(r)
        r.port = port  # type: ignore[attr-defined]
        break_ring(r, how)
        with trio.fail_after(1):
            assert await connection.stream.receive_some(1) == b""
        assert not r.channel.driver_up
        with pytest.raises(VsockRefused):
            await r.channel.connect(7)
        await connection.aclose()
        # The driver starts anew, as after a reboot of the guest.
        for index, queue in enumerate((r.driver.rx, r.driver.tx)):
            await r.call(r.driver.stop_ring, index)
            queue.reset()
        r.driver.tx_free.clear()
        r.driver.tx_free.extend(range(r.driver.queue_size // 2))
        for index, queue in enumerate((r.driver.rx, r.driver.tx)):
            await r.call(r.driver.start_ring, index, queue, 0)
        r.driver.refill(range(r.driver.queue_size))
        again, _ = await accepted(r)
        await again.aclose()


async def test_a_defect_of_ours_resets_the_device_only(
    rig: RigFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig() as r:
        connection, port = await accepted(r)

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(r.mux, "_packet", fail)
        r.driver.send(Packet(wire.OP_RW, 7, port, payload=b"x"))
        with trio.fail_after(1):
            assert await connection.stream.receive_some(1) == b""
        assert not r.channel.driver_up
        assert "internal error" in caplog.text
        await connection.aclose()


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (vu.SET_VRING_NUM, struct.pack("<II", 9, 128)),
        (vu.SET_VRING_NUM, struct.pack("<II", 0, 128)),  # it runs
        (vu.SET_VRING_KICK, struct.pack("<Q", 0)),  # without a descriptor
        (vu.SET_VRING_KICK, struct.pack("<Q", 0x100)),
        (vu.SET_MEM_TABLE, struct.pack("<II", 1 << 30, 0)),
        (6, b""),
        (77, b""),
    ],
)
async def test_a_front_end_that_breaks_the_protocol_is_dropped(
    rig: RigFactory, request_: int, payload: bytes
) -> None:
    async with rig() as r:
        with pytest.raises(EOFError):
            await r.call(r.driver.request, request_, payload)
        with pytest.raises(VmmGoneError, match="broke the vhost-user protocol"):
            await r.channel.connect(1)
