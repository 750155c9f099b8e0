# SPDX-License-Identifier: Apache-2.0
"""The host's ends of a process's streams: what a stdin, stdout or stderr URI opens.

Descriptors here are non-blocking.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from urllib.parse import unquote

import trio

# Slots of 4 KiB; one can hold up to 32 KiB of a spliced socket buffer, so that this is 2 MiB
# at most while nobody reads.  A fourth of it costs a quarter of the throughput.
_PIPE_SIZE = 256 << 10

log = logging.getLogger(__name__)


class StdioError(Exception):
    """A stdio URI can't be opened; the message names it."""


def split_uri(uri: str) -> tuple[str, str]:
    """(scheme, rest) of a stdio URI; a plain path has the scheme ``fifo``.

    Returns:
        The rest is a path; with its query for ``binary``.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or "/" in scheme:
        return "fifo", uri
    return scheme.lower(), rest if scheme.startswith("binary") else unquote(rest)


class Sink:
    """Where one output stream goes.

    Attributes:
        name: for messages.
        fd: non-blocking descriptor, -1 where output is thrown away.
        is_pipe: data can be spliced into it.
    """

    def __init__(self, name: str, fd: int, *, is_pipe: bool) -> None:
        self.name = name
        self.fd = fd
        self.is_pipe = is_pipe
        self._warned = False

    @classmethod
    def null(cls) -> Sink:
        return cls("nowhere", -1, is_pipe=False)

    def duplicate(self) -> Sink:
        """The same open file for a second stream, which may wait for room by itself."""
        fd = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 3) if self.fd >= 0 else -1
        return Sink(self.name, fd, is_pipe=self.is_pipe)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            trio.lowlevel.notify_closing(self.fd)
            os.close(self.fd)
            self.fd = -1

    def failed(self, error: OSError) -> None:
        """Warn once.  A full disk may get room again; any other failure is for good."""
        if not self._warned:
            self._warned = True
            log.warning("output to %s is lost: %s", self.name, error.strerror)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            self.close()

    async def write(self, data: bytes | memoryview) -> None:
        """Deliver all of it, waiting for a full pipe's reader; never raises OSError."""
        view = memoryview(data)
        while view and self.fd >= 0:
            try:
                written = os.write(self.fd, view)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.fd)
            except OSError as error:
                self.failed(error)
                return
            else:
                view = view[written:]


class Source:
    """Where stdin comes from.

    A fifo is held open for writing too, as runc's shim does: a client may detach and another
    attach, and only `release` lets the end through.

    Attributes:
        fd: non-blocking descriptor for reading.
    """

    def __init__(self, name: str, fd: int, holder: int) -> None:
        self.name = name
        self.fd = fd
        self._holder = holder

    def release(self) -> None:
        """The end of stdin comes when the last client has closed it.  Idempotent."""
        if self._holder >= 0:
            os.close(self._holder)
            self._holder = -1

    def close(self) -> None:
        self.release()
        if self.fd >= 0:
            trio.lowlevel.notify_closing(self.fd)
            os.close(self.fd)
            self.fd = -1


def check_source(uri: str) -> str:
    """The path behind `uri`, found to be something that `open_source` can open.

    Raises:
        StdioError: names `uri`.
    """
    scheme, path = split_uri(uri)
    if scheme not in ("fifo", "file"):
        raise StdioError(f"stdin {uri!r}: scheme {scheme!r} is not supported")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise StdioError(f"stdin {uri!r}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise StdioError(f"stdin {uri!r}: is a directory")
    return path


def open_source(uri: str) -> Source:
    """Raises:
    StdioError: names `uri`.
    """
    path = check_source(uri)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StdioError(f"stdin {uri!r}: {error.strerror}") from None
    holder = -1
    try:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            holder = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        os.close(fd)
        raise StdioError(f"stdin {uri!r}: {error.strerror}") from None
    return Source(uri, fd, holder)


def open_sink(uri: str) -> Sink:
    """Open a fifo (by path or ``fifo://``), a file that is there, or a ``file://``.

    Raises:
        StdioError: names `uri`.
    """
    scheme, path = split_uri(uri)
    if scheme not in ("fifo", "file"):
        log.warning("no output to %s: scheme %r is not supported", uri, scheme)
        return Sink.null()
    flags = os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if scheme == "file":
            os.makedirs(os.path.dirname(path) or "/", 0o755, exist_ok=True)
            return Sink(uri, os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644), is_pipe=False)
        mode = os.stat(path).st_mode
        if not stat.S_ISFIFO(mode):
            return Sink(uri, os.open(path, os.O_WRONLY | flags), is_pipe=False)
        # Open for reading too: a write to a fifo whose reader left waits for the next one.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StdioError(f"output {uri!r}: {error.strerror}") from None
    enlarge(fd)
    return Sink(uri, fd, is_pipe=True)


def enlarge(fd: int) -> None:
    """Give a pipe room for much at once, where the kernel lets us."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
