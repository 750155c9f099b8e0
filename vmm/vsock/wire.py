# SPDX-License-Identifier: Apache-2.0
"""virtio-vsock packets and the state of one connection, without I/O.

Numbers and rules are those of the virtio 1.2 specification, section 5.10.  Everything here
sees the guest as the peer: ``rx`` is guest to host, ``tx`` host to guest.
"""

from __future__ import annotations

import enum
import struct

#: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt (5.10.6)
HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = HEADER.size

HOST_CID = 2
TYPE_STREAM = 1

OP_REQUEST = 1
OP_RESPONSE = 2
OP_RST = 3
OP_SHUTDOWN = 4
OP_RW = 5
OP_CREDIT_UPDATE = 6
OP_CREDIT_REQUEST = 7

#: the sender of this flag receives / sends no more
SHUTDOWN_RCV = 1
SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = SHUTDOWN_RCV | SHUTDOWN_SEND

_U32 = 0xFFFF_FFFF


class State(enum.Enum):
    """Life of a connection; CLOSED is final."""

    REQUESTED = "requested"
    OPEN = "open"
    CLOSED = "closed"


class Outcome(enum.Enum):
    """What a received packet means for whoever holds the connection."""

    NOTHING = 0
    OPENED = 1
    DATA = 2
    SHUTDOWN = 3
    CLOSED = 4


class Connection:
    """Flow control and life of one stream, seen from the host.

    The owner feeds the guest's packets to `receive`, tells `forwarded` what it has passed on,
    asks `credit` before it sends, and sends the packets that `next_control` returns.  Counters
    are free-running 32-bit numbers as on the wire.
    """

    __slots__ = (
        "_owed",
        "advertised",
        "buf_alloc",
        "fwd_cnt",
        "guest_cid",
        "guest_done",
        "guest_port",
        "host_done",
        "host_port",
        "peer_buf_alloc",
        "peer_fwd_cnt",
        "rx_cnt",
        "state",
        "tx_cnt",
    )

    def __init__(self, guest_cid: int, guest_port: int, host_port: int, buf_alloc: int) -> None:
        self.guest_cid = guest_cid
        self.guest_port = guest_port
        self.host_port = host_port
        self.buf_alloc = buf_alloc
        self.rx_cnt = 0
        self.fwd_cnt = 0
        self.advertised = 0
        self.tx_cnt = 0
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0
        self.guest_done = 0  # SHUTDOWN_* flags that the guest has sent
        self.host_done = 0  # and that we have sent, or owe
        self.state = State.REQUESTED
        self._owed = 0  # bit 1 << op for each control packet still to be sent

    def request(self) -> None:
        """The host opens the connection."""
        self._owed |= 1 << OP_REQUEST

    def accept(self, peer_buf_alloc: int, peer_fwd_cnt: int) -> None:
        """The guest opened it (its REQUEST carried these numbers) and the host agrees."""
        self.peer_buf_alloc = peer_buf_alloc
        self.peer_fwd_cnt = peer_fwd_cnt
        self.state = State.OPEN
        self._owed |= 1 << OP_RESPONSE

    def receive(self, op: int, flags: int, length: int, buf_alloc: int, fwd_cnt: int) -> Outcome:
        """Take a packet of the guest; `length` bytes of payload are really there.

        A packet that is out of order, over the credit given or unknown closes the connection
        and owes an RST: a guest that lies loses this connection and nothing else.
        """
        state = self.state
        if state is State.CLOSED:
            return Outcome.NOTHING
        self.peer_buf_alloc = buf_alloc
        self.peer_fwd_cnt = fwd_cnt
        if op == OP_RW and state is State.OPEN:
            rx_cnt = (self.rx_cnt + length) & _U32
            over = ((rx_cnt - self.fwd_cnt) & _U32) > self.buf_alloc
            if not over and not self.guest_done & SHUTDOWN_SEND:
                self.rx_cnt = rx_cnt
                return Outcome.DATA if length else Outcome.NOTHING
        elif op == OP_CREDIT_UPDATE and state is State.OPEN:
            return Outcome.NOTHING
        elif op == OP_CREDIT_REQUEST and state is State.OPEN:
            self._owed |= 1 << OP_CREDIT_UPDATE
            return Outcome.NOTHING
        elif op == OP_RESPONSE and state is State.REQUESTED:
            self.state = State.OPEN
            return Outcome.OPENED
        elif op == OP_RST:
            self.state = State.CLOSED
            self._owed = 0
            return Outcome.CLOSED
        elif op == OP_SHUTDOWN and state is State.OPEN and flags & SHUTDOWN_BOTH:
            self.guest_done |= flags & SHUTDOWN_BOTH
            if self.guest_done == SHUTDOWN_BOTH:
                self.reset()
            return Outcome.SHUTDOWN
        self.reset()
        return Outcome.CLOSED

    def forwarded(self, count: int) -> None:
        """`count` received bytes have left our buffer: that much credit is free again.

        The guest is told once half of a window is free that it doesn't know of: often enough
        that it is not stopped by news we withhold, and not disturbed for every write.  Its window
        is no larger than its own receive buffer: since 2025 Linux sends no more than that ahead.
        """
        self.fwd_cnt = fwd_cnt = (self.fwd_cnt + count) & _U32
        if (
            ((fwd_cnt - self.advertised) & _U32) << 1 >= min(self.buf_alloc, self.peer_buf_alloc)
            and self.state is State.OPEN
            and not self.guest_done & SHUTDOWN_SEND
        ):
            self._owed |= 1 << OP_CREDIT_UPDATE

    def credit(self) -> int:
        """Bytes that the guest has room for; 0 also if it won't receive any more."""
        if self.state is not State.OPEN or (self.guest_done & SHUTDOWN_RCV):
            return 0
        room = self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & _U32)
        return room if room > 0 else 0

    def shutdown(self, flags: int) -> None:
        """The host will not send (`SHUTDOWN_SEND`) or receive (`SHUTDOWN_RCV`) any more."""
        if self.state is State.OPEN and flags & ~self.host_done:
            self.host_done |= flags
            self._owed |= 1 << OP_SHUTDOWN

    def reset(self) -> None:
        """End it at once: an RST is owed, and everything else that was is not."""
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self._owed = 1 << OP_RST

    def owes(self) -> bool:
        return self._owed != 0

    def next_control(self) -> bytes | None:
        """The next packet without payload that must go out, or None; lowest op first except
        that news of credit goes before the end of the stream."""
        owed = self._owed
        if not owed:
            return None
        for op in (OP_REQUEST, OP_RESPONSE, OP_CREDIT_UPDATE, OP_SHUTDOWN, OP_RST):
            if owed & (1 << op):
                break
        self._owed = owed & ~(1 << op)
        return self.header(op, 0, self.host_done if op == OP_SHUTDOWN else 0)

    def header(self, op: int, length: int, flags: int = 0) -> bytes:
        """A header for the guest.  It carries our credit, so a pending update is settled by it."""
        self.advertised = self.fwd_cnt
        self._owed &= ~(1 << OP_CREDIT_UPDATE)
        return HEADER.pack(
            HOST_CID,
            self.guest_cid,
            self.host_port,
            self.guest_port,
            length,
            TYPE_STREAM,
            op,
            flags,
            self.buf_alloc,
            self.fwd_cnt,
        )

    def data_header(self, length: int) -> bytes:
        """The header of `length` bytes of payload, which the caller has checked against
        `credit`."""
        self.tx_cnt = (self.tx_cnt + length) & _U32
        return self.header(OP_RW, length)


def reset_for(guest_cid: int, guest_port: int, host_cid: int, host_port: int, type_: int) -> bytes:
    """The RST that answers a packet for which there is no connection."""
    return HEADER.pack(host_cid, guest_cid, host_port, guest_port, 0, type_, OP_RST, 0, 0, 0)
