# SPDX-License-Identifier: Apache-2.0
"""The vsock device proper: moves packets between two virtqueues and many socket pairs.

Synchronous and bounded: `service` does one slice of work (at most `BUDGET` bytes a direction)
and says whether there is more.  All descriptors of interest are in one epoll descriptor, so
that the event loop has a single thing to wait for; the sockets that are read from have an epoll
of their own within it, which is left out while the guest has no receive buffers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import traceback
from collections import deque
from collections.abc import Callable

from vmm.vsock import wire
from vmm.vsock.backend import RX, TX, Ring
from vmm.vsock.link import Link, Settled
from vmm.vsock.segments import cut, skip, trim, write_header
from vmm.vsock.table import IN, QUIET, LinkTable, Refused
from vmm.vsock.virtqueue import Chain, QueueError, Virtqueue
from vmm.vsock.wire import Outcome, State

_log = logging.getLogger(__name__)

#: Bytes a direction and slice: about 0.3 ms of work, which is what an RPC may wait for.
BUDGET = 1 << 20
#: What a packet costs beside its payload, in bytes of budget.
PACKET_COST = 512

#: Unanswered resets after which the guest's packets wait until it offers receive buffers.
MAX_REPLIES = 128
#: Receive buffers filled by one system call, and segments in one.
MAX_BURST = 16
MAX_SEGMENTS = 512

_HUP = select.EPOLLHUP | select.EPOLLERR

Incoming = Callable[[int, Link, socket.socket], None]


class Mux:
    """See the module.  A `RingUser` of the vhost-user back-end.

    Args:
        cid: the guest's.
        ports: host ports that the guest may connect to; called with the guest's port, the new
            link and the host's end of its pair.
        on_request: told of each connection attempt of the guest to a port without a listener.
    """

    def __init__(
        self,
        cid: int,
        ports: dict[int, Incoming],
        on_request: Callable[[int], None] = lambda port: None,
    ) -> None:
        self.cid = cid
        self._ports = ports
        self._on_request = on_request
        self._table = table = LinkTable(cid)
        self._epoll = table.epoll
        self._readers = table.readers
        self._starved = True  # `_readers` is not part of `_epoll`
        self._rx: Ring | None = None
        self._tx: Ring | None = None
        self._kicks: dict[int, Ring] = {}
        self._links = table.links
        self._by_fd = table.by_fd
        self._owed = table.owed
        self._replies: deque[bytes] = deque()
        self._touched: dict[Link, None] = {}
        #: bytes of payload, ever
        self.to_guest = 0
        self.from_guest = 0
        #: bytes moved since the counter was last reset by whoever reads it
        self.moved = 0

    def fileno(self) -> int:
        """Readable when `service` has something to do."""
        return self._epoll.fileno()

    @property
    def ready(self) -> bool:
        """The guest's driver runs both rings."""
        return self._rx is not None and self._tx is not None

    def close(self) -> None:
        """Drop every connection and descriptor."""
        self.guest_reset()
        self._table.close()

    # --- the rings -------------------------------------------------------------------------

    def rings_started(self, rings: list[Ring]) -> None:
        for ring in rings:
            if ring.queue is not None and ring.kick_fd not in self._kicks:
                self._kicks[ring.kick_fd] = ring
                self._epoll.register(ring.kick_fd, select.EPOLLIN)
        self._rx = rings[RX] if rings[RX].queue is not None else None
        self._tx = rings[TX] if rings[TX].queue is not None else None
        # Kicks from before we listened are lost, so look once.
        for ring in self._kicks.values():
            os.eventfd_write(ring.kick_fd, 1)

    def ring_stopping(self, ring: Ring) -> None:
        if self._kicks.pop(ring.kick_fd, None) is not None:
            self._epoll.unregister(ring.kick_fd)
        if ring is self._rx:
            self._rx = None
            self._starve()
        elif ring is self._tx:
            self._tx = None

    def guest_reset(self) -> None:
        self._replies.clear()
        self._touched.clear()
        for link in list(self._links.values()):
            link.segments.clear()
            link.connection.state = State.CLOSED
            self._table.closed(link)
        self._owed.clear()

    # --- connections -----------------------------------------------------------------------

    def open(self, guest_port: int, settled: Settled) -> tuple[Link, socket.socket]:
        """Ask the guest for a connection; returns the link and the host's end of its pair.

        `settled` is called with True when the guest has accepted and with False when it has
        refused.

        Raises:
            Refused: the driver is not up, or there are too many connections.
        """
        if not self.ready:
            raise Refused("the guest's vsock driver is not up")
        link, theirs = self._table.open(guest_port, settled)
        self._send_now()
        return link, theirs

    def abort(self, link: Link) -> None:
        """Reset the connection and forget what waits."""
        link.settled = None
        link.host_closed = True
        link.discard()
        link.connection.reset()
        self._table.closed(link)
        self._send_now()

    def when_written(self, link: Link, tell: Callable[[], None]) -> bool:
        """Call `tell` once all that has been received so far is in the pair's socket; True if
        that is so already."""
        if link.written >= link.received:
            return True
        link.waiters.append((link.received, tell))
        return False

    def _accept(self, guest_port: int, host_port: int, buf_alloc: int, fwd_cnt: int) -> bool:
        """A connection attempt of the guest.  False refuses it."""
        handler = self._ports.get(host_port)
        if handler is None:
            self._on_request(host_port)
            return False
        try:
            link, theirs = self._table.accept(guest_port, host_port, buf_alloc, fwd_cnt)
        except Refused:
            return False
        handler(guest_port, link, theirs)
        return True

    # --- work ------------------------------------------------------------------------------

    def service(self) -> bool:
        """One slice of work; True if there is more to do at once.

        What the guest breaks ends the ring or the connection concerned; nothing is raised for
        it.
        """
        try:
            return self._service()
        except Exception:
            # A defect of ours, reached through something the guest did: it loses its
            # connections, the sandbox's shim lives.
            # As text: a traceback kept somewhere would hold on to guest memory.
            _log.error("vsock device: internal error, it is reset\n%s", traceback.format_exc())
            self.guest_reset()
            for ring in list(self._kicks.values()):
                self._break(ring)
            return False

    def _service(self) -> bool:
        readable = False
        for fd, mask in self._epoll.poll(0, 64):
            if fd == self._readers.fileno():
                readable = True
            elif fd in self._kicks:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif (link := self._by_fd.get(fd)) is not None:
                self._writable(link, mask)
        more = False
        if self._tx is not None:
            more = self._guarded(self._tx, self._serve_tx)
        if self._rx is not None:
            stalled = len(self._replies) >= MAX_REPLIES
            more |= self._guarded(self._rx, self._serve_rx, readable or self._starved)
            more |= stalled and len(self._replies) < MAX_REPLIES
        return more

    def _guarded(self, ring: Ring, work: Callable[..., bool], *args: bool) -> bool:
        try:
            return work(ring, *args)
        except QueueError as error:
            _log.warning("vsock device: the guest broke ring %d: %s", ring.index, str(error))
            self.guest_reset()
            self._break(ring)
            return False

    def _break(self, ring: Ring) -> None:
        self.ring_stopping(ring)
        ring.fail()

    def _send_now(self) -> None:
        """Control packets that were just made need not wait for the next slice."""
        if self._rx is not None:
            self._guarded(self._rx, self._serve_rx, False)

    # guest to host

    def _serve_tx(self, ring: Ring) -> bool:
        queue = ring.queue
        assert queue is not None
        queue.disable_kick()
        budget = BUDGET
        more = True
        while budget > 0 and len(self._replies) < MAX_REPLIES:
            chain = queue.pop()
            if chain is None:
                if queue.enable_kick():
                    continue
                more = False
                break
            budget -= PACKET_COST + self._packet(chain[1])
            queue.push(chain[0], 0)
        for link in self._touched:
            self._flush(link)
        self._touched.clear()
        if queue.publish():
            ring.call()
        self.moved += BUDGET - budget
        return more and len(self._replies) < MAX_REPLIES

    def _packet(self, segments: list[memoryview]) -> int:
        """Take one packet of the guest; returns the bytes of payload that were taken."""
        if segments and len(segments[0]) == wire.HEADER_SIZE:
            header = segments[0]
            del segments[0]
        else:
            header = memoryview(cut(segments, wire.HEADER_SIZE))
            if len(header) < wire.HEADER_SIZE:
                return 0
        fields: tuple[int, ...] = wire.HEADER.unpack_from(header)
        cid, host_cid, guest_port, host_port, length, type_, op, flags, buf_alloc, fwd_cnt = fields
        if cid != self.cid:
            return 0
        link = self._links.get(guest_port << 32 | host_port)
        if link is None or type_ != wire.TYPE_STREAM or host_cid != wire.HOST_CID:
            if op == wire.OP_RST or (
                op == wire.OP_REQUEST
                and type_ == wire.TYPE_STREAM
                and host_cid == wire.HOST_CID
                and self._accept(guest_port, host_port, buf_alloc, fwd_cnt)
            ):
                return 0
            self._replies.append(wire.reset_for(cid, guest_port, host_cid, host_port, type_))
            return 0
        connection = link.connection
        if op == wire.OP_RW:
            if len(segments) != 1 or len(segments[0]) != length:
                segments = trim(segments, length)
                if sum(map(len, segments)) != length:
                    # The header promises more than the packet holds.
                    op = 0
        else:
            length = 0
        outcome = connection.receive(op, flags, length, buf_alloc, fwd_cnt)
        if outcome is Outcome.DATA:
            self.from_guest += length
            link.segments += segments
            self._touched[link] = None
            if len(link.segments) >= MAX_SEGMENTS:
                self._flush(link)
        elif outcome is Outcome.OPENED:
            self._readers.register(link.fd, IN)
            link.settle(True)
        elif outcome is not Outcome.NOTHING:
            self._flush(link)
            if connection.state is State.CLOSED:
                self._table.closed(link)
            else:
                self._table.finish(link)
        if link.blocked and connection.credit():
            link.blocked = False
            if not link.host_eof and link.fd >= 0:
                self._readers.modify(link.fd, IN)
        if connection.owes():
            self._owed[link] = None
        return length

    def _flush(self, link: Link) -> None:
        """Out of guest memory with a link's data, before the guest gets its buffers back."""
        if not link.segments:
            return
        backlog = len(link.backlog)
        if not link.take_segments(MAX_SEGMENTS) and link.fd >= 0:
            self._table.host_closed(link)
        elif link.backlog and not backlog:
            self._epoll.register(link.fd, select.EPOLLOUT)
        if link.connection.owes():
            self._owed[link] = None

    def _writable(self, link: Link, mask: int) -> None:
        """The host has read some of what fills its socket, or closed it."""
        alive = link.drain(MAX_SEGMENTS) and not mask & _HUP
        if not alive or not link.backlog:
            self._epoll.unregister(link.fd)
        if not alive:
            link.discard()
            self._table.host_closed(link)
        elif not link.backlog:
            self._table.finish(link)
        if link.connection.owes():
            self._owed[link] = None

    # host to guest

    def _serve_rx(self, ring: Ring, readable: bool) -> bool:
        queue = ring.queue
        assert queue is not None
        queue.disable_kick()
        budget = BUDGET
        try:
            if not self._send_control(queue):
                self._starve()
                return False
            if self._starved:
                self._starved = False
                self._epoll.register(self._readers.fileno(), select.EPOLLIN)
            while readable and budget > 0:
                events = self._readers.poll(0, 64)
                if not events:
                    return False
                short = False
                for fd, mask in events:
                    link = self._by_fd.get(fd)
                    # Even without buffers all events must be seen: a hang-up comes only once.
                    if link is None or (short and not link.host_eof and not link.blocked):
                        continue
                    if link.blocked:
                        if mask & _HUP:
                            self._table.hung_up(link)
                        continue
                    moved = self._pump(link, queue, mask)
                    if moved < 0:
                        short = True
                    else:
                        budget -= moved
                if short or (self._owed and not self._send_control(queue)):
                    self._starve()
                    return False
            return readable
        finally:
            self.moved += BUDGET - budget
            if ring.queue is not None and queue.publish():
                ring.call()

    def _starve(self) -> None:
        """The guest has no receive buffers: wait for its kick, and not for the host."""
        if not self._starved:
            self._starved = True
            self._epoll.unregister(self._readers.fileno())
        if self._rx is not None and self._rx.queue is not None and self._rx.queue.enable_kick():
            os.eventfd_write(self._rx.kick_fd, 1)

    def _send_control(self, queue: Virtqueue) -> bool:
        """Send what is owed; False if buffers ran out first."""
        replies = self._replies
        while replies:
            if not self._put(queue, replies[0]):
                return False
            replies.popleft()
        while self._owed:
            link = next(iter(self._owed))
            while link.connection.owes():
                chain = queue.pop()
                if chain is None:
                    return False
                packet = link.connection.next_control()
                assert packet is not None
                write_header(chain[2], packet)
                queue.push(chain[0], wire.HEADER_SIZE)
            del self._owed[link]
        return True

    def _put(self, queue: Virtqueue, packet: bytes) -> bool:
        chain = queue.pop()
        if chain is None:
            return False
        write_header(chain[2], packet)
        queue.push(chain[0], len(packet))
        return True

    def _pump(self, link: Link, queue: Virtqueue, mask: int) -> int:
        """Move data of the host into receive buffers; returns its cost, or -1 if there is no
        buffer."""
        connection = link.connection
        if link.host_eof:
            if mask & _HUP:
                self._table.host_closed(link)
            return 0
        credit = connection.credit()
        if not credit:
            link.blocked = True
            self._readers.modify(link.fd, QUIET)
            return 0
        chains: list[tuple[Chain, int]] = []
        vector: list[memoryview] = []
        room = 0
        while len(chains) < link.burst and room < credit and len(vector) < MAX_SEGMENTS:
            chain = queue.pop()
            if chain is None:
                break
            buffers = chain[2]
            if not buffers:
                raise QueueError("receive buffer without a byte to write")
            first = buffers[0]
            if len(first) > wire.HEADER_SIZE:
                payload = [first[wire.HEADER_SIZE :], *buffers[1:]]
            elif len(first) == wire.HEADER_SIZE:
                payload = buffers[1:]
            else:
                payload = skip(buffers, wire.HEADER_SIZE)
            size = sum(map(len, payload))
            if not size:
                raise QueueError("receive buffer without room for a payload")
            chains.append((chain, size))
            vector += payload
            room += size
        if not chains:
            return -1
        if room > credit:
            vector = trim(vector, credit)
        try:
            if len(vector) == 1:
                count = link.sock.recv_into(vector[0])
            else:
                count = link.sock.recvmsg_into(vector)[0]
        except BlockingIOError:
            queue.unpop(len(chains))
            return 0
        except ConnectionResetError:
            count = 0
            mask |= select.EPOLLHUP
        if not count:
            queue.unpop(len(chains))
            link.host_eof = True
            if mask & _HUP:
                self._table.host_closed(link)
            else:
                self._readers.modify(link.fd, QUIET)
                connection.shutdown(wire.SHUTDOWN_SEND)
                self._owed[link] = None
            return 0
        self.to_guest += count
        cost = count
        used = 0
        for chain, room in chains:
            if not count:
                break
            size = min(room, count)
            write_header(chain[2], connection.data_header(size))
            queue.push(chain[0], wire.HEADER_SIZE + size)
            count -= size
            used += 1
            cost += PACKET_COST
        if used < len(chains):
            queue.unpop(len(chains) - used)
            link.burst = max(1, used)
        elif link.burst < MAX_BURST:
            link.burst *= 2
        return cost
