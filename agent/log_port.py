# SPDX-License-Identifier: Apache-2.0
"""The agent's log for whoever connects to the port of `agent.log_vport`, one JSON object a line.

As Kata's agent serves it: one client at a time, who gets what was logged before, then what
follows; keys and the names of levels are those of its logger (slog's short names, which Kata's
runtime looks for).
"""

from __future__ import annotations

import os
import time
from _json import encode_basestring_ascii

from agent.loop import READ, WRITE, Loop
from agent.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_LEVELS = {
    "trace": "TRCE",
    "debug": "DEBG",
    "info": "INFO",
    "warning": "WARN",
    "error": "ERRO",
    "critical": "CRIT",
}
_KEPT = 256 << 10  # bytes that wait for a client, or for one that is slow
_CHUNK = 64 << 10


class LogPort:
    """Keeps lines from its making on; gives them away once it listens."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._inside = False  # a part of the first waiting line is already sent
        self._dropped = 0
        self._client = -1
        self._listener: Any = None
        self._loop: Loop | None = None

    def listen(self, listener: Any, loop: Loop) -> None:
        """Serve the connections of a listening, non-blocking `_socket.socket`, one by one."""
        self._listener, self._loop = listener, loop
        loop.watch(listener.fileno(), READ, self._accept)

    def add(self, level: str, message: str, fields: Mapping[str, Any]) -> None:
        """Log one message; what a client does not fetch in time is counted, not kept."""
        line = _line(level, message, fields)
        if len(self._waiting) + len(line) > _KEPT:
            self._dropped += 1
            return
        self._waiting += line
        if self._client >= 0:
            self._send()

    def _accept(self, _events: int) -> None:
        try:
            client, _ = self._listener._accept()
        except OSError:
            return
        assert self._loop is not None
        self._loop.unwatch(self._listener.fileno())  # the next one waits for the end of this one
        os.set_blocking(client, False)
        self._client = client
        self._send()

    def _send(self) -> None:
        """As much as the client takes; the loop calls again when it takes more."""
        assert self._loop is not None
        while self._waiting:
            try:
                sent = os.write(self._client, self._waiting[:_CHUNK])
            except BlockingIOError:
                break
            except OSError:
                self._leave()
                return
            self._inside = self._waiting[sent - 1] != 0x0A
            del self._waiting[:sent]
            if not self._waiting and self._dropped:
                fields = {"count": self._dropped}
                self._waiting += _line("warning", "log lines were dropped", fields)
                self._dropped = 0
        self._loop.watch(self._client, READ | (WRITE if self._waiting else 0), self._ready)

    def _ready(self, events: int) -> None:
        if events & ~WRITE:
            try:
                if not os.read(self._client, 4096):  # it has nothing to tell
                    self._leave()
                    return
            except BlockingIOError:
                pass
            except OSError:
                self._leave()
                return
        self._send()

    def _leave(self) -> None:
        assert self._loop is not None
        self._loop.unwatch(self._client)
        os.close(self._client)
        self._client = -1
        if self._inside:  # half a line is no line to the next client
            del self._waiting[: self._waiting.index(b"\n") + 1]
            self._inside = False
        self._loop.watch(self._listener.fileno(), READ, self._accept)


def _line(level: str, message: str, fields: Mapping[str, Any]) -> bytes:
    now = time.time()
    values = {
        "msg": message,
        "level": _LEVELS[level],
        "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z",
        "name": "kata-agent",
        "source": "agent",
        "version": VERSION,
        "pid": os.getpid(),
    }
    pairs = (
        f"{encode_basestring_ascii(name)}:{encode_basestring_ascii(str(value))}"
        for name, value in {**fields, **values}.items()
    )
    return b"{" + ",".join(pairs).encode() + b"}\n"
