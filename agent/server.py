# SPDX-License-Identifier: Apache-2.0
"""ttrpc on the agent's loop: listeners, connections, answers that come later."""

from __future__ import annotations

import os

from agent import log
from agent.loop import READ, WRITE, Future, Loop, Task, Timer
from ttrpc.errors import Code, ProtocolError, RpcError
from ttrpc.protocol import Connection, RequestReceived, Role

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, Protocol

    Handler = Callable[[Any], Any]

    class Service(Protocol):
        """What answers: a method for each RPC name, returning a message or a generator."""

        def find(self, service: str, method: str) -> tuple[Any, Handler, bool] | None:
            """The request's class, the handler, and whether it only waits: then it is given up
            with its client or at its deadline.  None if there is no such RPC."""


_CHUNK = 64 << 10
_LARGE_CHUNK = 1 << 20
_FIRST_REQUEST = b"\0\0\0\1\1"  # stream id 1, type request, as in a frame's header after its length
_BACKLOG = 8 << 20  # bytes of answers waiting: above this no more requests are read


class Server:
    """Serves every connection of a listening socket, or one stream such as a serial port.

    Args:
        service: finds handlers by name.
    """

    def __init__(self, loop: Loop, service: Service) -> None:
        self._loop = loop
        self._service = service

    def listen(self, listener: Any) -> None:
        """Accept connections of a listening, non-blocking `_socket.socket` for ever."""

        def accept(_events: int) -> None:
            try:
                fd, _ = listener._accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            self.serve(fd)

        self._loop.watch(listener.fileno(), READ, accept)

    def serve(
        self, fd: int, *, on_close: Callable[[], None] | None = None, clients_follow: bool = False
    ) -> None:
        """Serve one stream by its descriptor, which is closed in the end.

        Args:
            clients_follow: on a serial line one client may follow another without any sign but
                that its stream ids begin anew.
        """
        os.set_blocking(fd, False)
        _Client(self._loop, self._service, fd, on_close, clients_follow)


class _Client:
    """One connection."""

    def __init__(
        self,
        loop: Loop,
        service: Service,
        fd: int,
        on_close: Callable[[], None] | None,
        clients_follow: bool,
    ) -> None:
        self._loop = loop
        self._service = service
        self._fd = fd
        self._on_close = on_close
        self._clients_follow = clients_follow
        self._connection = Connection(Role.SERVER)
        self._waiting: dict[int, Task] = {}
        self._out = memoryview(b"")
        self._watched = 0
        self._watch()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if self._fd >= 0 and events & ~WRITE:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, max(_CHUNK, min(self._connection.missing, _LARGE_CHUNK)))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        if self._clients_follow and not self._connection.missing and data[4:9] == _FIRST_REQUEST:
            self._connection = Connection(Role.SERVER)
            self._give_up_waiting()
        try:
            for event in self._connection.receive_data(data):
                if isinstance(event, RequestReceived):
                    self._request(event)
        except ProtocolError as error:
            log.warning("connection closed", reason=error)
            self._close()
            return
        self._flush()

    def _request(self, event: RequestReceived) -> None:
        found = self._service.find(event.service, event.method)
        if found is None:
            name = f"/{event.service}/{event.method}"
            self._answer_error(event, RpcError(Code.UNIMPLEMENTED, f"method {name} is not here"))
            return
        kind, handler, only_waits = found
        try:
            request = kind.FromString(event.payload)
        except Exception as error:  # protobuf's DecodeError, without importing it
            text = f"{kind.DESCRIPTOR.full_name}: {error}"
            self._answer_error(event, RpcError(Code.INVALID_ARGUMENT, text))
            return
        try:
            reply = handler(request)
        except Exception as error:
            self._answer_error(event, error)
            return
        if hasattr(reply, "SerializeToString"):
            self._connection.send_response(event.stream_id, reply.SerializeToString())
            return
        self._wait_for(event, reply, only_waits)

    def _wait_for(
        self, event: RequestReceived, work: Generator[Any, Any, Any], only_waits: bool
    ) -> None:
        timer: Timer | None = None

        connection = self._connection

        def finished(future: Future) -> None:
            if timer is not None:
                timer.cancel()
            if self._fd < 0 or connection is not self._connection:
                return  # nobody is there to be answered
            self._waiting.pop(event.stream_id, None)
            if future.error is not None:
                self._answer_error(event, future.error)
            else:
                self._connection.send_response(event.stream_id, future.value.SerializeToString())
            self._flush()

        def too_late() -> None:
            task.cancel()
            task.future.fail(RpcError(Code.DEADLINE_EXCEEDED, f"{event.method}: deadline"))

        task = self._loop.spawn(work)
        if only_waits and not task.future.done:
            self._waiting[event.stream_id] = task
            if event.timeout_nano:
                timer = self._loop.after(max(0, event.timeout_nano) / 1e9, too_late)
        task.future.then(finished)

    def _answer_error(self, event: RequestReceived, error: BaseException) -> None:
        if isinstance(error, RpcError):
            code, text = error.code, error.message
        elif isinstance(error, OSError):
            code, text = Code.INTERNAL, str(error)
        else:
            log.exception(error)
            code, text = Code.INTERNAL, f"{type(error).__name__}: {error}"
        log.debug("failed", method=event.method, code=int(code), error=text)
        self._connection.send_response(event.stream_id, code=code, message=text)

    def _flush(self) -> None:
        if self._fd < 0:
            return
        while True:
            if not self._out:
                self._out = memoryview(self._connection.data_to_send())
                if not self._out:
                    break
            try:
                self._out = self._out[os.write(self._fd, self._out) :]
            except BlockingIOError:
                break
            except OSError:
                self._close()
                return
        self._watch()

    def _watch(self) -> None:
        waiting = len(self._out) + self._connection.queued
        wanted = (WRITE if waiting else 0) | (READ if waiting < _BACKLOG else 0)
        if wanted != self._watched:
            self._watched = wanted
            self._loop.watch(self._fd, wanted, self._ready)

    def _give_up_waiting(self) -> None:
        """A dead reader must not take what the next one is to get."""
        for task in self._waiting.values():
            task.cancel()
        self._waiting.clear()

    def _close(self) -> None:
        self._loop.unwatch(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._give_up_waiting()
        if self._on_close is not None:
            self._on_close()
