# SPDX-License-Identifier: Apache-2.0
"""Connections from the host to the loopback address of the guest, for `port-forward`.

On a connection to the forward port the host sends the TCP port in two bytes, big-endian.  The
answer is one byte: 0, and from then on both ways are the TCP connection's; or the errno, and
the end.
"""

from __future__ import annotations

import _socket
import errno
import os

from agent.loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_ADDRESSES = ((_socket.AF_INET, "127.0.0.1"), (_socket.AF_INET6, "::1"))
_CHUNK = 256 << 10
_PATIENCE = 10.0  # seconds for the two bytes, and for the connection


def accept(listener: Any, loop: Loop) -> None:
    """Serve the next connection of a listening, non-blocking `_socket.socket`, if there is one."""
    try:
        fd, _ = listener._accept()
    except OSError:
        return
    _Forward(loop, fd)


class _Forward:
    """One connection of the host's, on its way to a server in the guest."""

    def __init__(self, loop: Loop, host: int) -> None:
        self._loop = loop
        self._host = host
        self._header = b""
        self._socket: Any = None
        self._addresses = list(_ADDRESSES)
        self._code = errno.ECONNREFUSED
        self._timer = loop.after(_PATIENCE, lambda: self._answer(errno.ETIMEDOUT))
        os.set_blocking(host, False)
        loop.watch(host, READ, self._read_header)

    def _read_header(self, _events: int) -> None:
        try:
            data = os.read(self._host, 2 - len(self._header))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._answer(errno.EPIPE)
            return
        self._header += data
        if len(self._header) == 2:
            self._loop.unwatch(self._host)
            self._try_next()

    def _try_next(self) -> None:
        """Connect by IPv4, then by IPv6: servers of one of them only are common."""
        while self._addresses:
            family, address = self._addresses.pop(0)
            kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
            try:
                self._socket = _socket.socket(family, kind)
            except OSError as error:  # a kernel without IPv6
                self._code = error.errno or errno.EIO
                continue
            code = self._socket.connect_ex((address, int.from_bytes(self._header, "big")))
            if code in (0, errno.EINPROGRESS):
                self._loop.watch(self._socket.fileno(), WRITE, self._connected)
                return
            self._code = code
            self._socket.close()
            self._socket = None
        self._answer(self._code)

    def _connected(self, _events: int) -> None:
        self._loop.unwatch(self._socket.fileno())
        code = self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if code == 0:
            self._answer(0)
            return
        self._code = code
        self._socket.close()
        self._socket = None
        self._try_next()

    def _answer(self, code: int) -> None:
        self._timer.cancel()
        self._loop.unwatch(self._host)
        try:
            os.write(self._host, bytes([min(code, 255)]))
        except OSError:
            code = code or errno.EPIPE
        if code == 0:
            _Relay(self._loop, self._host, self._socket.detach())
            return
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
        os.close(self._host)


class _Relay:
    """Bytes between two sockets, each way until its end; closes both after the second."""

    def __init__(self, loop: Loop, host: int, guest: int) -> None:
        self._loop = loop
        self._fds = (host, guest)
        self._ways = (_Way(host, guest), _Way(guest, host))
        for fd in self._fds:
            os.set_blocking(fd, False)
        self.update()

    def update(self) -> None:
        """Watch each socket for what its two ways wait for; close both when nothing is left."""
        if all(way.ended for way in self._ways):
            self.close()
            return
        for fd in self._fds:
            events = 0
            for way in self._ways:
                events |= way.wants(fd)
            if events:
                self._loop.watch(fd, events, self._ready(fd))
            else:
                self._loop.unwatch(fd)

    def _ready(self, fd: int) -> Callable[[int], None]:
        def ready(_events: int) -> None:
            for way in self._ways:
                if way.wants(fd) and not way.move():
                    self.close()
                    return
            self.update()

        return ready

    def close(self) -> None:
        """At once, in both directions; what is on its way is lost."""
        for fd in self._fds:
            self._loop.unwatch(fd)
            os.close(fd)


class _Way:
    """One direction."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._left = memoryview(b"")
        self.ended = False

    def wants(self, fd: int) -> int:
        if self.ended:
            return 0
        if self._left:
            return WRITE if fd == self._target else 0
        return READ if fd == self._source else 0

    def move(self) -> bool:
        """One piece; False if the connection is broken."""
        try:
            if not self._left:
                data = os.read(self._source, _CHUNK)
                if not data:
                    self.ended = True
                    _shut_down(self._target)
                    return True
                self._left = memoryview(data)
            self._left = self._left[os.write(self._target, self._left) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _shut_down(fd: int) -> None:
    """End the outgoing direction of a socket of any family."""
    other = _socket.socket(fileno=os.dup(fd))
    try:
        other.shutdown(_socket.SHUT_WR)
    except OSError:
        pass
    finally:
        other.close()
