# SPDX-License-Identifier: Apache-2.0
"""The vhost-user-vsock device as a channel: its unix socket, and its tasks."""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from vmm.errors import VmmConfigError
from vmm.hypervisor import VsockDevice
from vmm.vsock import vhost_user as vu
from vmm.vsock.backend import Backend, Ring
from vmm.vsock.channel import (
    CONNECT_TIMEOUT,
    Handler,
    VsockChannel,
    VsockConnection,
    VsockNoAnswer,
    VsockRefused,
)
from vmm.vsock.link import Link
from vmm.vsock.mux import Incoming, Mux
from vmm.vsock.table import Refused

_log = logging.getLogger(__name__)

DEFAULT_CID = 3
#: After so many bytes moved the page-table entries that this has cost are given back.
FORGET_AFTER = 32 << 20


def _stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


class LinkConnection(VsockConnection):
    """A connection through our own device."""

    def __init__(self, mux: Mux, link: Link, sock: socket.socket) -> None:
        super().__init__(_stream(sock), link.connection.host_port)
        self._mux = mux
        self._link = link

    async def delivered(self) -> None:
        event = trio.Event()
        if self._mux.when_written(self._link, event.set):
            await trio.lowlevel.checkpoint()
        else:
            await event.wait()

    def abort(self) -> None:
        self._mux.abort(self._link)
        super().abort()


class VhostUserChannel(VsockChannel):
    """Our own vsock device.

    One task serves the device: it waits for one epoll descriptor and does a bounded slice of
    work for each wake-up.  Another one talks vhost-user with the VMM.

    Entering it raises VmmConfigError if the socket can't be made.

    Args:
        path: unix socket to listen on (made with mode 0600, removed at the end).
        cid: the guest's.  Every VM has a device of its own, so they may all have the same.
    """

    def __init__(self, path: Path, cid: int = DEFAULT_CID) -> None:
        super().__init__()
        if not 3 <= cid < 0xFFFF_FFFF:
            raise ValueError(f"guest CID {cid}")
        self._path = path
        self._cid = cid
        self._ports: dict[int, Incoming] = {}
        self._mux = Mux(cid, self._ports, self._guest_knocked)
        # Each is replaced when it is set, so that it stands for the next time.
        self._up = trio.Event()
        self._knock = trio.Event()
        self._backend: Backend | None = None

    @property
    def device(self) -> VsockDevice:
        return VsockDevice(id="vsock0", cid=self._cid, socket=self._path)

    @property
    def payload(self) -> tuple[int, int]:
        return self._mux.to_guest, self._mux.from_guest

    @property
    def driver_up(self) -> bool:
        """The guest's vsock driver runs."""
        return self._mux.ready

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            try:
                listener.bind(os.fspath(self._path))
            except OSError as error:  # too long, in use, no directory
                raise VmmConfigError(f"vsock socket {self._path}: {error}") from error
            try:
                self._path.chmod(0o600)
                listener.listen(1)
                async with super()._open():
                    assert self._nursery is not None
                    self._nursery.start_soon(self._serve)
                    self._nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listener))
                    yield
            finally:
                self._path.unlink(missing_ok=True)
        finally:
            listener.close()
            self._mux.close()

    async def _connect(self, port: int) -> VsockConnection:
        answered = trio.Event()
        accepted = False

        def settled(opened: bool) -> None:
            nonlocal accepted
            accepted = opened
            answered.set()

        try:
            link, sock = self._mux.open(port, settled)
        except Refused as refused:
            await trio.lowlevel.checkpoint()
            raise VsockRefused(str(refused)) from None
        try:
            with trio.move_on_after(CONNECT_TIMEOUT):
                await answered.wait()
            if accepted:
                return LinkConnection(self._mux, link, sock)
        except BaseException:
            self._mux.abort(link)
            sock.close()
            raise
        self._mux.abort(link)
        sock.close()
        if not answered.is_set():
            raise VsockNoAnswer(f"guest port {port}: no answer")
        raise VsockRefused(f"guest port {port}: nobody listens")

    async def _ready_to_connect(self) -> None:
        while not self._mux.ready:
            await self._up.wait()

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._knock.wait()

    def _guest_knocked(self, port: int) -> None:
        # A guest that tries to reach a host port where nobody listens has something to say:
        # an agent may do so once it listens itself, and is then found without a pause.
        self._knock.set()
        self._knock = trio.Event()

    def listen(self, port: int, handler: Handler) -> None:
        self._ports[port] = partial(self._take, handler)

    def _take(self, handler: Handler, guest_port: int, link: Link, sock: socket.socket) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._handle, handler, LinkConnection(self._mux, link, sock))

    async def _handle(self, handler: Handler, connection: VsockConnection) -> None:
        async with connection:
            try:
                await handler(connection)
            except Exception:
                _log.exception("handler of a connection made by the guest failed")

    # --- tasks -----------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Work on the rings."""
        mux = self._mux
        more = False
        while True:
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(mux.fileno())
            more = mux.service()
            if mux.moved > FORGET_AFTER:
                mux.moved = 0
                if self._backend is not None:
                    self._backend.memory.forget_pages()

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        """Talk to one front-end after the other: a device that is unplugged and plugged again
        comes with a new connection."""
        while True:
            front_end, _ = await listener.accept()
            self._gone = None
            with front_end:
                self._backend = backend = Backend(self._cid, _Rings(self))
                try:
                    try:
                        await self._session(backend, front_end)
                        detail = "the VMM closed the vsock device"
                    except (vu.VhostUserError, OSError) as error:
                        _log.warning("vhost-user: %s", error)
                        detail = f"the VMM broke the vhost-user protocol: {error}"
                    self.mark_gone(detail)
                finally:
                    self._backend = None
                    self._mux.guest_reset()
                    backend.close()

    async def _session(self, backend: Backend, front_end: trio.socket.SocketType) -> None:
        parser = vu.Parser()
        try:
            while True:
                data, ancillary, flags, _ = await front_end.recvmsg(
                    parser.wanted, socket.CMSG_SPACE(vu.MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
                fds = _descriptors(ancillary)
                message = parser.receive(data, fds)
                if flags & socket.MSG_CTRUNC:
                    raise vu.VhostUserError("too many file descriptors in one message")
                if not data:
                    return
                if message is not None:
                    reply = backend.handle(message)
                    if reply is not None:
                        # Replies are tens of bytes and the front-end waits for them.
                        await front_end.send(reply)
        finally:
            parser.close()

    def _driver_started(self) -> None:
        if self._mux.ready:
            self._up.set()
            self._up = trio.Event()
            if self.on_driver_up is not None:
                self.on_driver_up()


class _Rings:
    """Passes the back-end's news to the mux, and the driver's start to those who wait."""

    def __init__(self, channel: VhostUserChannel) -> None:
        self._channel = channel
        self._mux = channel._mux

    def rings_started(self, rings: list[Ring]) -> None:
        self._mux.rings_started(rings)
        self._channel._driver_started()

    def ring_stopping(self, ring: Ring) -> None:
        self._mux.ring_stopping(ring)

    def guest_reset(self) -> None:
        self._mux.guest_reset()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()
