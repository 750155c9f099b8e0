# SPDX-License-Identifier: Apache-2.0
"""QMP over a unix socket, for trio."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import trio

from vmm.errors import VmmError, VmmGoneError
from vmm.qemu.qmp import Event, Greeting, QmpConnection, QmpProtocolError, Reply

COMMAND_TIMEOUT = 20.0
"""Seconds until a command without an answer counts as lost."""


class QmpError(VmmError):
    """QEMU refused a command; ``error_class`` is QMP's (``DeviceNotFound`` …)."""

    def __init__(self, message: str, error_class: str = "") -> None:
        super().__init__(message)
        self.error_class = error_class


class QmpClient:
    """One connection.  ``run`` is its reader, a task of the owner's nursery; commands may be
    sent from any task, before the greeting too: they then wait for the handshake.

    Args:
        sock: connected unix stream socket; owned from here on.
        on_event: called for each event, in order.
        greeting: of a connection whose handshake somebody else has done.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_event: Callable[[Event], None],
        greeting: Greeting | None = None,
    ) -> None:
        sock.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._protocol = QmpConnection()
        self._on_event = on_event
        self._pending: dict[int, _Waiter] = {}
        self._send_lock = trio.Lock()
        self._greeted = trio.Event()
        self._ready = trio.Event()
        self._closed = trio.Event()
        self.greeting = greeting
        if greeting is not None:
            self._ready.set()

    def duplicate(self) -> int:
        """A descriptor of the same connection, for another process to go on with.  No command
        may be under way."""
        return os.dup(self._socket.fileno())

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    async def run(self) -> None:
        """Read until the peer closes or speaks nonsense; then fail all who wait."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._negotiate)
                # Whoever waits learns from `_closed` that the connection is gone.
                with contextlib.suppress(OSError, QmpProtocolError):
                    await self._read_all()
                nursery.cancel_scope.cancel()
        finally:
            self._closed.set()
            self._ready.set()
            for waiter in self._pending.values():
                waiter.event.set()
            self._socket.close()

    async def wait_closed(self) -> None:
        """Return when the connection has ended and every event before that was delivered."""
        await self._closed.wait()

    async def wait_ready(self) -> None:
        """Return once commands are accepted, or raise VmmGoneError."""
        await self._ready.wait()
        if self.closed:
            raise VmmGoneError("QEMU closed its control socket")

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: tuple[int, ...] = (),
        timeout: float = COMMAND_TIMEOUT,
    ) -> Any:
        """Send a command, return the value of its answer.

        Args:
            fds: descriptors passed along (for ``getfd``).
            timeout: seconds; covers the wait for the handshake as well.

        Raises:
            QmpError: QEMU refused it, or did not answer in time.
            VmmGoneError: the connection ended.
        """
        with trio.move_on_after(timeout):
            await self.wait_ready()
            return await self._execute(command, arguments, fds)
        raise QmpError(f"QEMU did not answer {command} within {timeout:g} s")

    async def _execute(
        self, command: str, arguments: Mapping[str, Any] | None, fds: tuple[int, ...]
    ) -> Any:
        number, data = self._protocol.command(command, arguments)
        waiter = self._pending[number] = _Waiter()
        try:
            await self._send(data, fds)
            if not self.closed:
                await waiter.event.wait()
        finally:
            del self._pending[number]
        reply = waiter.reply
        if reply is None:
            raise VmmGoneError(f"QEMU ended before it answered {command}")
        if reply.error is not None:
            raise QmpError(f"QEMU refused {command}: {reply.error}", reply.error_class)
        return reply.value

    async def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        # Half a line sent would spoil the next command: a line once begun is finished.
        async with self._send_lock:
            with trio.CancelScope(shield=True):
                try:
                    rights = array.array("i", fds).tobytes()
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
                    sent = await self._socket.sendmsg([data], ancillary)
                    while sent < len(data):
                        sent += await self._socket.send(data[sent:])
                except OSError as error:
                    raise VmmGoneError("QEMU closed its control socket") from error

    async def _negotiate(self) -> None:
        await self._greeted.wait()
        try:
            await self._execute("qmp_capabilities", None, ())
        except VmmError:
            return  # the reader sees the end of the connection as well
        self._ready.set()

    async def _read_all(self) -> None:
        while data := await self._socket.recv(65536):
            for message in self._protocol.receive_data(data):
                if isinstance(message, Reply):
                    waiter = self._pending.get(message.id)
                    if waiter is not None:
                        waiter.reply = message
                        waiter.event.set()
                elif isinstance(message, Event):
                    self._on_event(message)
                else:
                    self.greeting = message
                    self._greeted.set()


class _Waiter:
    __slots__ = ("event", "reply")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.reply: Reply | None = None
