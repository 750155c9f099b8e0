# SPDX-License-Identifier: Apache-2.0
"""Bytes between a guest's raw stream and a host's end, without an RPC per chunk."""

from __future__ import annotations

import errno
import logging
import os
import select
from typing import Protocol

import trio

from shimv2.endpoints import Sink, Source

# At most so much is moved per turn of the event loop, so that a flood can't delay an RPC.
_SPLICE_BYTES = 1 << 20  # pages change hands, nothing is copied
_COPY_BYTES = 256 << 10
_STDIN_BYTES = 64 << 10
_QUIET = 0.5  # seconds; Kata's agent drains no longer after a process has ended

log = logging.getLogger(__name__)


class GuestReader(Protocol):
    """A process's stdout or stderr, as it comes from the guest."""

    @property
    def fd(self) -> int | None:
        """A non-blocking stream socket to splice from, or None: then `read` is used."""

    async def read(self, limit: int) -> bytes:
        """Up to `limit` bytes; b"" at the end."""

    async def delivered(self) -> None:
        """Return once all that had come from the guest lies in the socket (if there is one)."""

    async def aclose(self) -> None: ...


class GuestWriter(Protocol):
    """A process's stdin; `aclose` is its end."""

    async def write(self, data: bytes) -> None: ...

    async def aclose(self) -> None: ...


class OutputPump:
    """One output stream of a process, from the guest to its sink.

    A failing sink never stops the process: what can't be written is read and thrown away.
    """

    def __init__(self, name: str, reader: GuestReader, sink: Sink) -> None:
        self._name = name
        self._reader = reader
        self._sink = sink
        self._done = trio.Event()
        self._idle_waiters: list[trio.Event] = []
        self._waiting: trio.CancelScope | None = None
        self._in_read = False
        self._progress = trio.Event()
        self._poll = select.poll()

    async def run(self) -> None:
        """Until the end of the stream."""
        try:
            if self._reader.fd is None:
                await self._run_reader()
            else:
                await self._run_socket(self._reader.fd)
        except Exception as error:  # the guest's end failed: that is the end of this stream only
            log.warning("%s: %s", self._name, error or type(error).__name__)
        finally:
            self._sink.close()
            self._done.set()
            self._progress.set()
            self._notify_idle()
            await _close(self._name, self._reader)

    async def drained(self) -> None:
        """Return once all that had come from the guest at the time of the call is in the sink."""
        if self._done.is_set():
            return
        try:
            await self._reader.delivered()
        except Exception as error:  # the guest is gone: what is in the socket is all there is
            log.debug("%s: %s", self._name, error or type(error).__name__)
        if self._reader.fd is None:
            await self._quiet()
            return
        idle = self._next_idle()
        if self._waiting is not None:
            self._waiting.cancel()
        await idle.wait()

    async def _quiet(self) -> None:
        """Without a socket nothing tells that all is there, but for the end of the stream: a
        call that stays unanswered for a while means that a descendant holds the pipe."""
        while not self._done.is_set():
            if not self._in_read:
                await self._next_idle().wait()
            with trio.move_on_after(_QUIET):
                await self._progress.wait()
                continue
            return

    def _next_idle(self) -> trio.Event:
        idle = trio.Event()
        self._idle_waiters.append(idle)
        return idle

    async def _run_socket(self, source: int) -> None:
        move = self._splice if self._sink.is_pipe else self._copy
        if self._sink.is_pipe and self._sink.fd >= 0:
            self._poll.register(self._sink.fd, select.POLLOUT)
        while True:
            try:
                count = await move(source)
            except BlockingIOError:
                await self._nothing_there(source)
                continue
            except (ConnectionResetError, BrokenPipeError):
                return
            except OSError as error:
                if error.errno != errno.EINVAL or move == self._copy:
                    raise
                move = self._copy  # a kernel whose sockets of this kind don't splice
                continue
            if count == 0:
                return
            await trio.lowlevel.checkpoint()

    async def _splice(self, source: int) -> int:
        """Move what is there; raises BlockingIOError only for an empty source."""
        while self._sink.fd >= 0:
            try:
                return os.splice(
                    source,
                    self._sink.fd,
                    _SPLICE_BYTES,
                    flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE,
                )
            except BlockingIOError:
                if self._poll.poll(0):  # there is room, so it is the source that has nothing
                    raise
                await trio.lowlevel.wait_writable(self._sink.fd)
            except BrokenPipeError as error:  # a logger that ended
                self._sink.failed(error)
        return await self._copy(source)

    async def _copy(self, source: int) -> int:
        data = os.read(source, _COPY_BYTES)
        if data and self._sink.fd >= 0:
            await self._sink.write(data)
        return len(data)

    async def _nothing_there(self, source: int) -> None:
        self._notify_idle()
        with trio.CancelScope() as self._waiting:
            await trio.lowlevel.wait_readable(source)
        self._waiting = None

    async def _run_reader(self) -> None:
        while True:
            self._in_read = True
            self._notify_idle()
            data = await self._reader.read(_COPY_BYTES)
            self._in_read = False
            self._progress.set()
            self._progress = trio.Event()
            if not data:
                return
            await self._sink.write(data)

    def _notify_idle(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            waiter.set()


class InputPump:
    """stdin of a process, from the host's end to the guest."""

    def __init__(self, name: str, source: Source, writer: GuestWriter) -> None:
        self._name = name
        self._source = source
        self._writer = writer
        self._closing = False
        self._waiting: trio.CancelScope | None = None

    async def run(self) -> None:
        """Until the end of stdin, or until the process reads no more."""
        try:
            while data := await self._next():
                await self._writer.write(data)
        except Exception as error:  # the process closed its end: not a failure
            log.debug("%s: %s", self._name, error or type(error).__name__)
        finally:
            self._source.close()
            await _close(self._name, self._writer)

    def finish(self) -> None:
        """Deliver what is in the fifo now, then end."""
        self._closing = True
        self._source.release()
        if self._waiting is not None:
            self._waiting.cancel()

    async def _next(self) -> bytes:
        while True:
            try:
                data = os.read(self._source.fd, _STDIN_BYTES)
            except BlockingIOError:
                if self._closing:
                    return b""
            else:
                await trio.lowlevel.checkpoint()
                return data
            with trio.CancelScope() as self._waiting:
                await trio.lowlevel.wait_readable(self._source.fd)
            self._waiting = None


async def _close(name: str, stream: GuestReader | GuestWriter) -> None:
    try:
        await stream.aclose()
    except Exception as error:  # over RPC that is a call, and the process may be gone
        log.debug("%s: closing: %s", name, error or type(error).__name__)
