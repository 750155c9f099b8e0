# SPDX-License-Identifier: Apache-2.0
"""The shim's log: logfmt lines into the bundle's ``log`` fifo, which containerd copies.

Each line has the sandbox; one that a call led to has its container, and its exec.  The reader
may be away or slow, and the shim must never wait for it: a line that does not fit is dropped
and counted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar

_about: ContextVar[str] = ContextVar("_about", default="")

_LEVELS = {"WARNING": "warning", "CRITICAL": "fatal"}
_LINE_LIMIT = 8192  # what a guest or a helper prints may be of any length


class FifoHandler(logging.Handler):
    """Writes to a fifo without ever blocking."""

    def __init__(self, path: str, fields: dict[str, str]) -> None:
        super().__init__()
        self._fd = _open(path)
        self._suffix = "".join(f" {key}={_quote(value)}" for key, value in fields.items())
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._fd < 0:
            return
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        if self._dropped:
            text = f"[{self._dropped} lines dropped] {text}"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = _LEVELS.get(record.levelname, record.levelname.lower())
        line = (
            f'time="{stamp}.{int(record.msecs):03d}Z" level={level} msg={_quote(text[:_LINE_LIMIT])}'
            f"{self._suffix}{_about.get()} source={record.name}\n"
        )
        try:
            os.write(self._fd, line.encode(errors="replace"))
            self._dropped = 0
        except BlockingIOError:
            self._dropped += 1
        except OSError:
            self._dropped += 1  # EPIPE: containerd is away and comes back

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


@contextlib.contextmanager
def about(**fields: str) -> Iterator[None]:
    """Lines of the block, and of the tasks it starts, have these fields and no other call's."""
    token = _about.set("".join(f" {name}={_quote(value)}" for name, value in fields.items()))
    try:
        yield
    finally:
        _about.reset(token)


def set_up(bundle: str, fields: dict[str, str], *, debug: bool) -> None:
    """Send all logging of this process to ``bundle/log`` with `fields` on every line."""
    root = logging.getLogger()
    root.handlers[:] = [FifoHandler(os.path.join(bundle, "log"), fields)]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.raiseExceptions = False
    sys.excepthook = lambda kind, error, trace: root.critical(
        "%s: %s", kind.__name__, error, exc_info=(kind, error, trace)
    )


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return -1
    # Nobody reads yet: with a read end of our own the open succeeds and EPIPE never comes.
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    return -1


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
