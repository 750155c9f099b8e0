# SPDX-License-Identifier: Apache-2.0
"""The stdio of one process inside the guest: pipes or a pty, and who carries their bytes.

Either a raw vsock stream for each (`RawOutput`, `RawInput`), or the Read/WriteStream RPCs
(`RpcOutput`, `RpcInput`).  A process never holds the socket itself: /dev/stdout of a socket
can't be opened.
"""

from __future__ import annotations

import fcntl
import os

from agent.loop import READ, WRITE, Future, Loop
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PIECE = 1 << 20  # bytes of one splice
_BURST = 4 << 20  # bytes of one stream before others have their turn
_INPUT_CHUNK = 64 << 10
_READ_LIMIT = 1 << 20  # bytes of one ReadStream answer

_FIONREAD = 0x541B
_EIO = 5  # what a pty's leader reads when all followers are closed


class Output:
    """What reads a pipe's or a pty's end; the base of both kinds."""

    def __init__(self, loop: Loop, source: int) -> None:
        self._loop = loop
        self._source = source
        os.set_blocking(source, False)

    @property
    def source(self) -> int:
        """The descriptor it reads, -1 once it is closed."""
        return self._source

    def process_ended(self) -> Future:
        """The process is over: done when what it wrote is no longer on this side."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the source; what is still in it is lost."""
        if self._source >= 0:
            self._loop.unwatch(self._source)
            os.close(self._source)
            self._source = -1


class RawOutput(Output):
    """Moves bytes from the source to a vsock socket, by splice where the source is a pipe."""

    def __init__(self, loop: Loop, source: int, sink: int, *, is_pipe: bool) -> None:
        super().__init__(loop, source)
        self._sink = sink
        self._is_pipe = is_pipe
        self._move = self._splice if is_pipe else self._copy
        self._left = memoryview(b"")  # read, and not taken by the sink yet
        self._moved = 0
        self._goal = -1  # of `_moved`: then all is gone that the process has written
        self._ended = False
        self._drained = Future()
        os.set_blocking(sink, False)
        self._loop.watch(source, READ, self._pump)

    def process_ended(self) -> Future:
        self._ended = True
        if self._source < 0:
            self._drained.set()
            return self._drained
        if self._is_pipe:  # a descendant may go on writing: that isn't waited for
            self._goal = self._moved + self._pending()
        self._pump(0)
        return self._drained

    def close(self) -> None:
        super().close()
        if self._sink >= 0:
            self._loop.unwatch(self._sink)
            os.close(self._sink)
            self._sink = -1
        self._drained.set()

    def _pump(self, _events: int) -> None:
        end = self._moved + _BURST
        while self._source >= 0 and self._moved < end:
            if 0 <= self._goal <= self._moved:
                self._drained.set()
            try:
                count = self._move()
            except BlockingIOError:
                self._wait()
                return
            except OSError:  # nobody takes it any more: a writer gets EPIPE, as with runc
                self.close()
                return
            if count == 0:
                self.close()
                return
            self._moved += count
        if self._source >= 0:
            self._wait()

    def _wait(self) -> None:
        """Either end blocks: watch the one that does."""
        if 0 <= self._goal <= self._moved:
            self._drained.set()
        if self._left or (self._is_pipe and self._pending()):
            self._loop.unwatch(self._source)
            self._loop.watch(self._sink, WRITE, self._pump)
        else:
            self._loop.unwatch(self._sink)
            self._loop.watch(self._source, READ, self._pump)
            if self._ended:
                self._drained.set()

    def _pending(self) -> int:
        answer = fcntl.ioctl(self._source, _FIONREAD, b"\0\0\0\0")
        return int.from_bytes(answer, "little")

    def _splice(self) -> int:
        return os.splice(self._source, self._sink, _PIECE, flags=os.SPLICE_F_NONBLOCK)

    def _copy(self) -> int:
        if not self._left:
            try:
                data = os.read(self._source, _INPUT_CHUNK)
            except OSError as error:
                if error.errno == _EIO:
                    return 0
                raise
            if not data:
                return 0
            self._left = memoryview(data)
        count = os.write(self._sink, self._left)
        self._left = self._left[count:]
        return count


class RpcOutput(Output):
    """Answers ReadStdout and ReadStderr; reads nothing ahead, so an unread process waits."""

    def __init__(self, loop: Loop, source: int) -> None:
        super().__init__(loop, source)
        self._reader: tuple[int, Future] | None = None
        self._ended = False

    def process_ended(self) -> Future:
        """What was written can still be read; then comes the end, even if a descendant holds
        the stream."""
        self._ended = True
        if self._reader is not None:
            self._try(0)
        done = Future()
        done.set()
        return done

    def forget(self, future: Future) -> None:
        """Who called `read` is gone; the bytes are for the next one."""
        if self._reader is not None and self._reader[1] is future:
            self._reader = None
            self._loop.unwatch(self._source)

    def read(self, size: int) -> Future:
        """Up to `size` bytes as soon as there are some; at the end an error, as Kata's."""
        future = Future()
        if self._source < 0:
            future.fail(_end_of_stream())
        elif self._reader is not None:
            future.fail(RpcError(Code.FAILED_PRECONDITION, "this stream is being read already"))
        else:
            self._reader = (min(size, _READ_LIMIT), future)
            self._try(0)
        return future

    def close(self) -> None:
        super().close()
        self._answer(None, _end_of_stream())

    def _try(self, _events: int) -> None:
        assert self._reader is not None
        try:
            data = os.read(self._source, self._reader[0])
        except BlockingIOError:
            if not self._ended:
                self._loop.watch(self._source, READ, self._try)
                return
            data = b""
        except OSError:
            data = b""
        self._loop.unwatch(self._source)
        if data:
            self._answer(data, None)
        else:
            self.close()

    def _answer(self, data: bytes | None, error: RpcError | None) -> None:
        reader, self._reader = self._reader, None
        if reader is None:
            return
        if error is not None:
            reader[1].fail(error)
        else:
            reader[1].set(data)


class Input:
    """What feeds a process's stdin: a pipe, or the leader of its pty."""

    def __init__(self, loop: Loop, target: int, *, is_terminal: bool) -> None:
        self._loop = loop
        self._target = target
        self._is_terminal = is_terminal
        self._left = memoryview(b"")
        self._ending = False
        os.set_blocking(target, False)

    def close(self) -> None:
        """The end of stdin; a terminal's is not the end of its output, so it stays open."""
        if self._target >= 0:
            self._loop.unwatch(self._target)
            os.close(self._target)
            self._target = -1

    def _push(self) -> bool:
        """Write what is left; True if nothing is."""
        while self._left:
            try:
                self._left = self._left[os.write(self._target, self._left) :]
            except BlockingIOError:
                return False
            except OSError:  # the process closed its stdin or is gone
                self._left = memoryview(b"")
        return True


class RawInput(Input):
    """Moves bytes from a vsock socket into stdin; the socket's end is stdin's."""

    def __init__(self, loop: Loop, source: int, target: int, *, is_terminal: bool) -> None:
        super().__init__(loop, target, is_terminal=is_terminal)
        self._source = source
        os.set_blocking(source, False)
        loop.watch(source, READ, self._read)

    def close(self) -> None:
        super().close()
        if self._source >= 0:
            self._loop.unwatch(self._source)
            os.close(self._source)
            self._source = -1

    def _read(self, _events: int) -> None:
        try:
            data = os.read(self._source, _INPUT_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._left = memoryview(data)
        if not self._push():
            self._loop.unwatch(self._source)
            self._loop.watch(self._target, WRITE, self._write)

    def _write(self, _events: int) -> None:
        if self._push():
            self._loop.unwatch(self._target)
            self._loop.watch(self._source, READ, self._read)


class RpcInput(Input):
    """Serves WriteStdin and CloseStdin."""

    def __init__(self, loop: Loop, target: int, *, is_terminal: bool) -> None:
        super().__init__(loop, target, is_terminal=is_terminal)
        self._writer: tuple[int, Future] | None = None

    def write(self, data: bytes) -> Future:
        """Write all of `data`; the future is their number."""
        future = Future()
        if self._target < 0 or self._ending:
            future.fail(RpcError(Code.FAILED_PRECONDITION, "stdin is closed"))
            return future
        if self._writer is not None:
            future.fail(RpcError(Code.FAILED_PRECONDITION, "stdin is being written already"))
            return future
        self._left = memoryview(data)
        self._writer = (len(data), future)
        self._continue(0)
        return future

    def finish(self) -> None:
        """CloseStdin: after what is being written."""
        self._ending = True
        if self._writer is None:
            self.close()

    def _continue(self, _events: int) -> None:
        if not self._push():
            self._loop.watch(self._target, WRITE, self._continue)
            return
        self._loop.unwatch(self._target)
        writer, self._writer = self._writer, None
        if writer is not None:
            writer[1].set(writer[0])
        if self._ending:
            self.close()


class Streams:
    """Raw connections of the stream port, waiting to be claimed by their peer's port."""

    _LIMIT = 1024  # connections not claimed
    _PATIENCE = 10.0  # seconds that a claim waits for its connection

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._arrived: dict[int, int] = {}
        self._wanted: dict[int, Future] = {}
        self._accept: Callable[[int], None] | None = None

    def listen(self, listener: Any) -> None:
        """Take connections of a listening, non-blocking `_socket.socket` for ever."""

        def ready(_events: int) -> None:
            while True:
                try:
                    fd, (_, port) = listener._accept()
                except BlockingIOError:
                    return
                except OSError:
                    return
                self._add(port, fd)

        self._accept = ready
        self._loop.watch(listener.fileno(), READ, ready)

    def claim(self, port: int) -> Future:
        """The descriptor of the connection whose peer has `port`; the host may be still at it."""
        future = Future()
        if self._accept is not None:
            self._accept(0)
        fd = self._arrived.pop(port, -1)
        if fd >= 0:
            future.set(fd)
            return future
        if port in self._wanted:
            future.fail(RpcError(Code.INVALID_ARGUMENT, f"stream port {port} is given twice"))
            return future
        self._wanted[port] = future
        self._loop.after(self._PATIENCE, lambda: self._give_up(port, future))
        return future

    def _give_up(self, port: int, future: Future) -> None:
        if self._wanted.get(port) is future:
            del self._wanted[port]
            future.fail(RpcError(Code.NOT_FOUND, f"no stream came from port {port}"))

    def _add(self, port: int, fd: int) -> None:
        future = self._wanted.pop(port, None)
        if future is not None:
            future.set(fd)
            return
        old = self._arrived.pop(port, -1)
        if old < 0 and len(self._arrived) >= self._LIMIT:
            old = self._arrived.pop(next(iter(self._arrived)))
        if old >= 0:
            os.close(old)
        self._arrived[port] = fd


def _end_of_stream() -> RpcError:
    return RpcError(Code.INTERNAL, "EOF")
