# SPDX-License-Identifier: Apache-2.0
"""A model of a guest: its memory (a memfd), a virtio-vsock driver on two split rings, and a
front-end that speaks vhost-user as QEMU does.

`RingDriver` moves raw packets and can be made to lie; `Guest` adds sockets with the guest
kernel's rules.  Run as a program it is a guest of its own process with a few services.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import select
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmm.vsock import vhost_user as vu
from vmm.vsock import wire

USER_BASE = 0x7F00_0000_0000
HIGH_BASE = 1 << 32  # a second region, as above 4 GiB
F_EVENT_IDX = 1 << 29
F_INDIRECT = 1 << 28
F_NEXT, F_WRITE, F_INDIRECT_DESC = 1, 2, 4
PACKET_MAX = 64 << 10


@dataclass(slots=True)
class Packet:
    op: int
    guest_port: int
    host_port: int
    flags: int = 0
    buf_alloc: int = 256 << 10
    fwd_cnt: int = 0
    payload: bytes = b""
    length: int | None = None  # what the header says, if not the truth
    type: int = 1
    cid: int = 3
    host_cid: int = 2

    def header(self) -> bytes:
        length = len(self.payload) if self.length is None else self.length
        return wire.HEADER.pack(
            self.cid,
            self.host_cid,
            self.guest_port,
            self.host_port,
            length,
            self.type,
            self.op,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        )


class Queue:
    """The driver's side of one ring at guest-physical (= memfd) offset `base`."""

    def __init__(self, memory: mmap.mmap, base: int, size: int, event_idx: bool) -> None:
        self.memory = memory
        self.size = size
        self.descriptors = base
        self.available = base + 16 * size
        self.used = (self.available + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.event_idx = event_idx
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.reset()

    def reset(self) -> None:
        self.memory[self.descriptors : self.end] = bytes(self.end - self.descriptors)
        self.avail_idx = 0
        self.kicked = 0
        self.last_used = 0

    def u16(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 2], "little")

    def set_u16(self, at: int, value: int) -> None:
        self.memory[at : at + 2] = value.to_bytes(2, "little")

    def describe(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        at = self.descriptors + 16 * index
        struct.pack_into("<QIHH", self.memory, at, address, length, flags, following)

    def offer(self, head: int) -> None:
        self.set_u16(self.available + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def kick(self, force: bool = False) -> None:
        old, new = self.kicked, self.avail_idx
        self.set_u16(self.available + 2, new)
        self.kicked = new
        if self.event_idx:
            event = self.u16(self.used + 4 + 8 * self.size)
            wanted = ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        else:
            wanted = not self.u16(self.used) & 1
        if wanted or force:
            os.eventfd_write(self.kick_fd, 1)

    def take(self) -> list[tuple[int, int]]:
        """[(head, bytes written)] that came back since."""
        done = []
        idx = self.u16(self.used + 2)
        while self.last_used != idx:
            at = self.used + 4 + 8 * (self.last_used % self.size)
            done.append(struct.unpack_from("<II", self.memory, at))
            self.last_used = (self.last_used + 1) & 0xFFFF
        return done

    def want_call(self) -> bool:
        """Ask for an interrupt at the next use; True if there was one already."""
        if self.event_idx:
            self.set_u16(self.available + 4 + 2 * self.size, self.last_used)
        return self.u16(self.used + 2) != self.last_used

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)


class RingDriver:
    """Guest memory of `size` bytes in two regions, with rings, and a vhost-user session."""

    def __init__(
        self,
        *,
        size: int = 32 << 20,
        queue_size: int = 128,
        rx_size: int = 4096,
        event_idx: bool = True,
        indirect: bool = False,
        split_rx_header: bool = False,
    ) -> None:
        self.size = size
        self.low = size // 2
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self.event_idx = event_idx
        self.indirect = indirect
        self.split_rx_header = split_rx_header
        self.queue_size = queue_size
        self.rx = Queue(self.memory, 0x1000, queue_size, event_idx)
        self.tx = Queue(self.memory, 0x10000, queue_size, event_idx)
        self.rx_size = rx_size
        self.rx_buffers = 0x100000
        self.tx_headers = 0x20000
        # Payloads lie in the upper region, so that both are used.
        self.tx_buffers = self.low
        self.tx_free = deque(range(queue_size // 2))
        self.session = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.acked = False

    def gpa(self, offset: int) -> int:
        return offset if offset < self.low else HIGH_BASE + offset - self.low

    # --- the session -----------------------------------------------------------------------

    def request(
        self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), reply: bool = False
    ) -> bytes:
        flags = vu.VERSION | (vu.FLAG_NEED_REPLY if self.acked and not reply else 0)
        data = vu.HEADER.pack(request, flags, len(payload)) + payload
        socket.send_fds(self.session, [data], list(fds))
        if not (reply or self.acked):
            return b""
        header = self._exactly(vu.HEADER.size)
        answered, flags, size = vu.HEADER.unpack(header)
        assert answered == request
        assert flags == vu.VERSION | vu.FLAG_REPLY
        body = self._exactly(size)
        if not reply:
            assert body == bytes(8), "request refused"
        return body

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.session.recv(count - len(data))
            if not more:
                raise EOFError("the back-end closed the session")
            data += more
        return data

    def ask(self, request: int) -> int:
        return int.from_bytes(self.request(request, reply=True), "little")

    def connect(self, path: Path) -> int:
        """Up to what QEMU does when the device is made; returns the CID from its config."""
        self.session.settimeout(10)
        self.session.connect(os.fspath(path))
        self.features = self.ask(vu.GET_FEATURES)
        self.protocol_features = self.ask(vu.GET_PROTOCOL_FEATURES)
        self.request(vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol_features))
        self.acked = bool(self.protocol_features & vu.F_REPLY_ACK)
        self.ask(vu.GET_QUEUE_NUM)
        self.slots = self.ask(vu.GET_MAX_MEM_SLOTS)
        self.request(vu.SET_OWNER)
        config = self.request(vu.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8), reply=True)
        return int.from_bytes(config[12:], "little")

    def region(self, start: int, size: int, user: int, offset: int) -> bytes:
        return bytes(8) + struct.pack("<QQQQ", start, size, user, offset)

    def start(self, *, base: tuple[int, int] = (0, 0), slots: bool = True) -> None:
        """What QEMU does when the driver says DRIVER_OK."""
        features = self.features
        if not self.event_idx:
            features &= ~F_EVENT_IDX
        self.request(vu.SET_FEATURES, struct.pack("<Q", features))
        regions = [
            (0, self.low, USER_BASE, 0),
            (HIGH_BASE, self.size - self.low, USER_BASE + self.low, self.low),
        ]
        if slots:
            for r in regions:
                self.request(vu.ADD_MEM_REG, self.region(*r), (self.fd,))
        else:
            table = struct.pack("<II", len(regions), 0)
            table += b"".join(struct.pack("<QQQQ", *r) for r in regions)
            self.request(vu.SET_MEM_TABLE, table, (self.fd,) * len(regions))
        for index, queue in enumerate((self.rx, self.tx)):
            self.start_ring(index, queue, base[index])
        self.refill(range(self.queue_size if not self.split_rx_header else self.queue_size // 2))

    def start_ring(self, index: int, queue: Queue, base: int) -> None:
        self.request(vu.SET_VRING_NUM, struct.pack("<II", index, queue.size))
        self.request(vu.SET_VRING_BASE, struct.pack("<II", index, base))
        addresses = (queue.descriptors, queue.used, queue.available)
        self.request(
            vu.SET_VRING_ADDR,
            struct.pack("<IIQQQQ", index, 0, *(USER_BASE + a for a in addresses), 0),
        )
        self.request(vu.SET_VRING_KICK, struct.pack("<Q", index), (queue.kick_fd,))
        self.request(vu.SET_VRING_CALL, struct.pack("<Q", index), (queue.call_fd,))
        self.request(vu.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop_ring(self, index: int) -> int:
        """Returns the index at which the ring stood."""
        self.request(vu.SET_VRING_ENABLE, struct.pack("<II", index, 0))
        state = self.request(vu.GET_VRING_BASE, struct.pack("<II", index, 0), reply=True)
        stood: int = struct.unpack("<II", state)[1]
        return stood

    # --- packets ---------------------------------------------------------------------------

    def refill(self, slots: range | list[int]) -> None:
        for slot in slots:
            at = self.rx_buffers + slot * self.rx_size
            if self.split_rx_header:
                head = 2 * slot
                self.rx.describe(head, self.gpa(at), 44, F_WRITE | F_NEXT, head + 1)
                self.rx.describe(head + 1, self.gpa(at + 44), self.rx_size - 44, F_WRITE, 0)
            else:
                head = slot
                self.rx.describe(head, self.gpa(at), self.rx_size, F_WRITE, 0)
            self.rx.offer(head)
        self.rx.kick()

    def transmit(self, packet: Packet) -> None:
        """Offer one packet; the caller checked `tx_free`, and kicks."""
        slot = self.tx_free.popleft()
        header = self.tx_headers + 64 * slot
        self.memory[header : header + 44] = packet.header()
        payload = packet.payload
        if not payload:
            self.tx.describe(2 * slot, self.gpa(header), 44, 0, 0)
        else:
            at = self.tx_buffers + slot * PACKET_MAX
            self.memory[at : at + len(payload)] = payload
            if self.indirect:
                table = self.tx_headers + 0x10000 + 32 * slot
                struct.pack_into("<QIHH", self.memory, table, self.gpa(header), 44, F_NEXT, 1)
                struct.pack_into("<QIHH", self.memory, table + 16, self.gpa(at), len(payload), 0, 0)
                self.tx.describe(2 * slot, self.gpa(table), 32, F_INDIRECT_DESC, 0)
            else:
                self.tx.describe(2 * slot, self.gpa(header), 44, F_NEXT, 2 * slot + 1)
                self.tx.describe(2 * slot + 1, self.gpa(at), len(payload), 0, 0)
        self.tx.offer(2 * slot)

    def send(self, *packets: Packet) -> None:
        for packet in packets:
            self.transmit(packet)
        self.tx.kick()

    def reclaim(self) -> int:
        done = self.tx.take()
        self.tx_free.extend(head // 2 for head, _ in done)
        return len(done)

    def receive(self) -> list[Packet]:
        """Packets that came, with their buffers offered again."""
        packets, slots = [], []
        for head, written in self.rx.take():
            slot = head // 2 if self.split_rx_header else head
            at = self.rx_buffers + slot * self.rx_size
            cid, host, hp, gp, length, kind, op, flags, alloc, fwd = wire.HEADER.unpack_from(
                self.memory, at
            )
            (cid, host) = (host, cid)
            assert written == 44 + (length if op == wire.OP_RW else 0)
            payload = self.memory[at + 44 : at + written]
            packets.append(Packet(op, gp, hp, flags, alloc, fwd, payload, None, kind, cid, host))
            slots.append(slot)
        if slots:
            self.refill(slots)
        return packets

    def close(self) -> None:
        self.session.close()
        self.rx.close()
        self.tx.close()
        self.memory.close()
        os.close(self.fd)


@dataclass(slots=True, eq=False)
class GuestSocket:
    """One socket of the model's kernel."""

    guest_port: int
    host_port: int
    service: str
    peer_buf_alloc: int = 0
    peer_fwd_cnt: int = 0
    tx_cnt: int = 0
    fwd_cnt: int = 0
    advertised: int = 0
    pending: deque[bytes] = field(default_factory=deque)
    to_send: int = 0  # bytes that a source still makes
    made: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    command: bytes = b""
    ended: bool = False  # we have said that we send no more
    end_wanted: bool = False
    peer_done: int = 0

    def credit(self) -> int:
        return self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & 0xFFFFFFFF)


BLOCK = hashlib.shake_128(b"model").digest(PACKET_MAX)


class Guest:
    """Services on ports: ``echo`` returns what comes and half-closes in answer to a half-close;
    ``sink`` answers the end of stream with the SHA-256 of what came; ``source`` reads a decimal
    number and a newline, then sends that many bytes (BLOCK over and over) and half-closes."""

    def __init__(self, driver: RingDriver, services: dict[int, str], buf_alloc: int = 256 << 10):
        self.driver = driver
        self.services = services
        self.buf_alloc = buf_alloc
        self.sockets: dict[tuple[int, int], GuestSocket] = {}
        self.control: deque[Packet] = deque()

    def step(self) -> None:
        """Handle what has come and send what may go."""
        driver = self.driver
        more = True
        while more:
            driver.reclaim()
            for packet in driver.receive():
                self._handle(packet)
            self._send()
            more = driver.rx.want_call() | driver.tx.want_call()

    def wait(self, timeout: float | None) -> None:
        fds: list[Any] = [self.driver.rx.call_fd, self.driver.tx.call_fd]
        for fd in select.select([*fds, self.driver.session], [], [], timeout)[0]:
            if fd in fds:
                os.eventfd_read(fd)
            elif not self.driver.session.recv(1):
                raise EOFError

    def _packet(self, sock: GuestSocket, op: int, flags: int = 0, payload: bytes = b"") -> Packet:
        sock.advertised = sock.fwd_cnt
        return Packet(
            op, sock.guest_port, sock.host_port, flags, self.buf_alloc, sock.fwd_cnt, payload
        )

    def _handle(self, packet: Packet) -> None:
        key = (packet.guest_port, packet.host_port)
        sock = self.sockets.get(key)
        if sock is None:
            service = self.services.get(packet.guest_port)
            if packet.op == wire.OP_REQUEST and service is not None:
                sock = self.sockets[key] = GuestSocket(*key, service)
                sock.peer_buf_alloc = packet.buf_alloc
                self.control.append(self._packet(sock, wire.OP_RESPONSE))
            elif packet.op != wire.OP_RST:
                self.control.append(Packet(wire.OP_RST, *key, buf_alloc=0))
            return
        sock.peer_buf_alloc, sock.peer_fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        if packet.op == wire.OP_RW:
            self._data(sock, packet.payload)
        elif packet.op == wire.OP_SHUTDOWN:
            sock.peer_done |= packet.flags
            if packet.flags & wire.SHUTDOWN_SEND and not sock.end_wanted:
                sock.end_wanted = True
                if sock.service == "sink":
                    sock.pending.append(sock.digest.digest())
            if sock.peer_done == wire.SHUTDOWN_BOTH:
                self.control.append(self._packet(sock, wire.OP_RST))
                del self.sockets[key]
        elif packet.op == wire.OP_RST:
            del self.sockets[key]

    def _data(self, sock: GuestSocket, data: bytes) -> None:
        if sock.service == "echo":
            sock.pending.append(data)
            return
        if sock.service == "sink":
            sock.digest.update(data)
        elif not sock.end_wanted:
            sock.command += data
            if sock.command.endswith(b"\n"):
                sock.to_send = int(sock.command)
                sock.end_wanted = True
        self._consumed(sock, len(data))

    def _consumed(self, sock: GuestSocket, count: int) -> None:
        sock.fwd_cnt = (sock.fwd_cnt + count) & 0xFFFFFFFF
        if ((sock.fwd_cnt - sock.advertised) & 0xFFFFFFFF) > self.buf_alloc // 4:
            self.control.append(self._packet(sock, wire.OP_CREDIT_UPDATE))

    def _send(self) -> None:
        driver = self.driver
        while self.control and driver.tx_free:
            driver.transmit(self.control.popleft())
        progress = True
        while progress and driver.tx_free:
            progress = False
            for sock in list(self.sockets.values()):
                if driver.tx_free and self._send_one(sock):
                    progress = True
        driver.tx.kick()

    def _send_one(self, sock: GuestSocket) -> bool:
        credit = min(sock.credit(), PACKET_MAX)
        if credit <= 0 or sock.ended:
            return False
        if sock.pending:
            data = sock.pending.popleft()
            if len(data) > credit:
                sock.pending.appendleft(data[credit:])
                data = data[:credit]
            if sock.service == "echo":
                self._consumed(sock, len(data))
        elif sock.to_send:
            at = sock.made % len(BLOCK)
            data = BLOCK[at : at + min(credit, sock.to_send)]
            sock.to_send -= len(data)
            sock.made += len(data)
        elif sock.end_wanted:
            sock.ended = True
            self.driver.transmit(self._packet(sock, wire.OP_SHUTDOWN, wire.SHUTDOWN_SEND))
            return True
        else:
            return False
        sock.tx_cnt = (sock.tx_cnt + len(data)) & 0xFFFFFFFF
        self.driver.transmit(self._packet(sock, wire.OP_RW, 0, data))
        return True


SERVICES = {1000: "echo", 1001: "sink", 1002: "source"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", type=Path)
    parser.add_argument("--no-event-idx", action="store_true")
    parser.add_argument("--indirect", action="store_true")
    parser.add_argument("--split-rx-header", action="store_true")
    args = parser.parse_args()
    driver = RingDriver(
        event_idx=not args.no_event_idx,
        indirect=args.indirect,
        split_rx_header=args.split_rx_header,
    )
    driver.connect(args.socket)
    driver.start()
    guest = Guest(driver, SERVICES)
    try:
        while True:
            guest.step()
            guest.wait(None)
    except EOFError:
        driver.close()


if __name__ == "__main__":
    main()
