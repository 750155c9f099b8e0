# SPDX-License-Identifier: Apache-2.0
"""One stream between a guest port and one end of a host socket pair."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from vmm.vsock.wire import Connection

Settled = Callable[[bool], None]
Callback = Callable[[], None]


def socket_pair(buf_alloc: int) -> tuple[socket.socket, socket.socket, int]:
    """(our end, the host's end, credit): the credit fits into an empty pair, so that all that
    the guest may have sent can be read without waiting for it to be forwarded in parts."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    so_sndbufforce = getattr(socket, "SO_SNDBUFFORCE", 32)
    try:
        ours.setsockopt(socket.SOL_SOCKET, so_sndbufforce, buf_alloc)
    except PermissionError:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buf_alloc)
    # The kernel doubles the value for its own overhead and tells the doubled one.
    return ours, theirs, min(buf_alloc, ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2)


class Link:
    """A connection with our end of its socket pair, and what waits between the two.

    Data of the guest goes from its memory straight into the socket; what the socket doesn't
    take is copied into `backlog`, which the credit given to the guest bounds.
    """

    __slots__ = (
        "backlog",
        "blocked",
        "burst",
        "connection",
        "fd",
        "host_closed",
        "host_eof",
        "incoming",
        "received",
        "segments",
        "settled",
        "sock",
        "waiters",
        "writing_ended",
        "written",
    )

    def __init__(
        self,
        connection: Connection,
        sock: socket.socket,
        settled: Settled | None = None,
        incoming: bool = False,
    ) -> None:
        self.connection = connection
        self.sock = sock
        self.fd = sock.fileno()
        #: told once whether the guest took the connection
        self.settled = settled
        self.incoming = incoming
        self.segments: list[memoryview] = []
        self.backlog: deque[memoryview] = deque()
        self.received = 0
        self.written = 0
        #: (bytes written by then, whom to tell)
        self.waiters: list[tuple[int, Callback]] = []
        self.blocked = False  # out of credit: not polled for data of the host
        self.host_eof = False  # the host sends no more
        self.host_closed = False  # the host closed its end wholly
        self.writing_ended = False
        self.burst = 1  # receive buffers to fill by one system call

    @property
    def key(self) -> int:
        return self.connection.guest_port << 32 | self.connection.host_port

    def take_segments(self, limit: int) -> bool:
        """Move `segments` (guest memory) into the socket, the rest into the backlog.

        Returns False if the host no longer reads; the data is gone then.
        """
        segments = self.segments
        total = sum(map(len, segments))
        self.received += total
        alive = not self.host_closed
        sent = 0
        if alive and not self.backlog:
            try:
                if len(segments) == 1:
                    sent = self.sock.send(segments[0])
                else:
                    sent = self.sock.sendmsg(segments[:limit])
            except BlockingIOError:
                pass
            except OSError:
                alive = False
        if not alive:
            self._count(total)
        else:
            if sent:
                self._count(sent)
            if sent < total:
                for segment in segments:
                    if sent >= len(segment):
                        sent -= len(segment)
                        continue
                    # The guest gets its buffer back after this, so the bytes are copied.
                    self.backlog.append(memoryview(bytes(segment[sent:])))
                    sent = 0
        segments.clear()
        return alive

    def drain(self, limit: int) -> bool:
        """Move more of the backlog into the socket.  False if the host no longer reads."""
        backlog = self.backlog
        while backlog:
            batch = [backlog[i] for i in range(min(limit, len(backlog)))]
            try:
                sent = self.sock.sendmsg(batch)
            except BlockingIOError:
                return True
            except OSError:
                self.discard()
                return False
            self._count(sent)
            for segment in batch:
                if sent < len(segment):
                    backlog[0] = segment[sent:]
                    break
                sent -= len(segment)
                backlog.popleft()
        return True

    def discard(self) -> None:
        """Nobody will read what waits."""
        total = sum(map(len, self.backlog))
        self.backlog.clear()
        self._count(total)

    def _count(self, count: int) -> None:
        self.written += count
        self.connection.forwarded(count)
        if self.waiters:
            due = [waiter for waiter in self.waiters if waiter[0] <= self.written]
            self.waiters = [waiter for waiter in self.waiters if waiter[0] > self.written]
            for _, tell in due:
                tell()

    def settle(self, opened: bool) -> None:
        """Tell whoever opened the connection how that went; once."""
        settled, self.settled = self.settled, None
        if settled is not None:
            settled(opened)
