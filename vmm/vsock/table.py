# SPDX-License-Identifier: Apache-2.0
"""The connections of one vsock device: who exists, who is owed a packet, who is polled for what."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time

from vmm.vsock import wire
from vmm.vsock.link import Link, Settled, socket_pair
from vmm.vsock.wire import Connection, State

MAX_CONNECTIONS = 1024
MAX_INCOMING = 256
#: Credit for one stream, and the sum of what is given out before new ones get less.
BUF_ALLOC = 512 << 10
MIN_BUF_ALLOC = 64 << 10
BUFFER_BUDGET = 64 << 20

#: A guest that doesn't answer the end of a connection is forgotten after this.
LINGER_SECONDS = 10.0
FIRST_HOST_PORT = 1 << 30

IN = select.EPOLLIN | select.EPOLLRDHUP
QUIET = select.EPOLLET  # hang-up only, and only once


class Refused(Exception):
    """No connection can be made now."""


class LinkTable:
    """Every link of a device, in one place with the descriptors it is polled by.

    Attributes:
        epoll: what the event loop waits for; links are in it while their backlog waits.
        readers: links whose socket is to be read.
        links: those the guest knows of, by `Link.key`.
        by_fd: those whose socket is open.
        owed: those that owe the guest a control packet, in order of need.
    """

    def __init__(self, cid: int) -> None:
        self.epoll = select.epoll()
        self.readers = select.epoll()
        self.links: dict[int, Link] = {}
        self.by_fd: dict[int, Link] = {}
        self.owed: dict[Link, None] = {}
        self._cid = cid
        self._lingering: dict[Link, float] = {}
        self._granted = 0
        self._incoming = 0
        self._next_port = FIRST_HOST_PORT + int.from_bytes(os.urandom(3), "little")

    def close(self) -> None:
        """Drop every link and descriptor."""
        for link in list(self.by_fd.values()):
            self.drop(link)
        self.readers.close()
        self.epoll.close()

    def open(self, guest_port: int, settled: Settled) -> tuple[Link, socket.socket]:
        """A link that is to ask for `guest_port`, and the host's end of its pair.

        Raises:
            Refused: there are too many.
        """
        self._make_room()
        while guest_port << 32 | self._next_port in self.links:
            self._next_port += 1
        host_port = self._next_port
        self._next_port = (
            host_port + 1 if host_port < 0xFFFF_FFF0 else FIRST_HOST_PORT
        )  # never soon again: the guest may still hold the old one
        ours, theirs, credit = socket_pair(self._credit())
        connection = Connection(self._cid, guest_port, host_port, credit)
        link = self._add(Link(connection, ours, settled))
        connection.request()
        self.owed[link] = None
        return link, theirs

    def accept(
        self, guest_port: int, host_port: int, buf_alloc: int, fwd_cnt: int
    ) -> tuple[Link, socket.socket]:
        """As `open`, for a connection that the guest asks for.

        Raises:
            Refused: there are too many.
        """
        if self._incoming >= MAX_INCOMING:
            raise Refused(f"{MAX_INCOMING} connections made by the guest are open")
        self._make_room()
        ours, theirs, credit = socket_pair(self._credit())
        connection = Connection(self._cid, guest_port, host_port, credit)
        connection.accept(buf_alloc, fwd_cnt)
        link = self._add(Link(connection, ours, incoming=True))
        self.owed[link] = None
        self.readers.register(link.fd, IN)
        return link, theirs

    def _credit(self) -> int:
        left = BUFFER_BUDGET - self._granted
        return max(MIN_BUF_ALLOC, min(BUF_ALLOC, left // 8))

    def _add(self, link: Link) -> Link:
        self.links[link.key] = link
        self.by_fd[link.fd] = link
        self._granted += link.connection.buf_alloc
        self._incoming += link.incoming
        return link

    def _make_room(self) -> None:
        """Forget connections that the host has closed and the guest does not let go of."""
        now = time.monotonic()
        for link, deadline in list(self._lingering.items()):
            full = len(self.links) >= MAX_CONNECTIONS
            if full or deadline <= now:
                if full:
                    link.connection.reset()
                else:
                    # No RST: it would cost the guest what it has not read yet.
                    link.connection.state = State.CLOSED
                self.closed(link)
        if len(self.links) >= MAX_CONNECTIONS or len(self.by_fd) >= MAX_CONNECTIONS:
            raise Refused(f"{MAX_CONNECTIONS} vsock connections are open")

    def closed(self, link: Link) -> None:
        """The guest knows the connection no more, or is to be told so."""
        if self.links.pop(link.key, None) is not None:
            self._granted -= link.connection.buf_alloc
            self._incoming -= link.incoming
        self._lingering.pop(link, None)
        if link.connection.owes():
            self.owed[link] = None
        link.settle(False)
        if not link.backlog:
            self.drop(link)
        elif link.fd >= 0 and not link.host_eof:
            link.host_eof = True
            self.readers.modify(link.fd, QUIET)

    def drop(self, link: Link) -> None:
        """Close our end of the pair; whatever the guest sends from now on is discarded."""
        if link.fd < 0:
            return
        del self.by_fd[link.fd]
        # Closing alone would do, if no process that was forked meanwhile held the socket, too.
        for epoll in (self.readers, self.epoll):
            with contextlib.suppress(FileNotFoundError):
                epoll.unregister(link.fd)
        link.fd = -1  # the number may be another link's soon
        link.host_closed = True
        link.discard()
        # Unread data would turn the host's end of stream into ECONNRESET.
        with contextlib.suppress(OSError):
            while not link.host_eof and link.sock.recv(65536):
                pass
        with contextlib.suppress(OSError):
            link.sock.shutdown(socket.SHUT_RDWR)
        link.sock.close()

    def finish(self, link: Link) -> None:
        """Pass on to the host what the guest has ended, once nothing waits any more."""
        if link.backlog or link.host_closed:
            return
        connection = link.connection
        if connection.state is State.CLOSED:
            self.drop(link)
            return
        if connection.guest_done & wire.SHUTDOWN_SEND and not link.writing_ended:
            link.writing_ended = True
            with contextlib.suppress(OSError):
                link.sock.shutdown(socket.SHUT_WR)
        if connection.guest_done & wire.SHUTDOWN_RCV and not link.host_eof:
            link.host_eof = True
            with contextlib.suppress(OSError):
                link.sock.shutdown(socket.SHUT_RD)
            self.readers.modify(link.fd, QUIET)

    def host_closed(self, link: Link) -> None:
        """The host closed its end and all it had sent is with the guest."""
        link.connection.shutdown(wire.SHUTDOWN_BOTH)
        if link.connection.owes():
            self.owed[link] = None
        self.drop(link)
        if link.connection.state is State.OPEN:
            self._lingering[link] = time.monotonic() + LINGER_SECONDS

    def hung_up(self, link: Link) -> None:
        """The host closed its end, but the guest has no room for all that it had sent.  That
        waits as long as it must, unless its place is needed."""
        self._lingering[link] = math.inf
