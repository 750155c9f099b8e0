# SPDX-License-Identifier: Apache-2.0
"""The QEMU Machine Protocol without I/O: bytes in, messages out.

QMP is JSON objects, one a line (QEMU's docs/interop/qmp-spec): a greeting, then replies
that carry the id of their command, and events at any time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_LINE = 1 << 20
"""Longest line accepted, in bytes; query-qmp-schema, the longest reply known, has 0.2 MiB."""


class QmpProtocolError(Exception):
    """The peer does not speak QMP; the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """``version`` is like ``7.2.22``; ``package`` is the distributor's text."""

    version: tuple[int, int, int]
    package: str


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to the command with this id; exactly one of `value` and `error` counts."""

    id: int
    value: Any = None
    error: str | None = None
    error_class: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, as ``SHUTDOWN`` or ``DEVICE_DELETED``."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


Message = Greeting | Reply | Event


class QmpConnection:
    """Client's side of one QMP connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._next_id = 0

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Bytes to send for a command, and the id its reply will carry."""
        self._next_id += 1
        message: dict[str, Any] = {"execute": name, "id": self._next_id}
        if arguments:
            message["arguments"] = dict(arguments)
        # QEMU reads it byte by byte, with seven system calls for each.
        return self._next_id, json.dumps(message, separators=(",", ":")).encode() + b"\n"

    def receive_data(self, data: bytes) -> list[Message]:
        """Feed what came in; returns the messages it completed.

        Raises:
            QmpProtocolError: a line is too long, is not JSON or is no QMP message.
        """
        self._buffer += data
        messages = []
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            if len(line) > MAX_LINE:
                raise QmpProtocolError(f"line of {len(line)} bytes")
            if line.strip():
                messages.append(_parse(line))
        self._scanned = len(self._buffer)
        if self._scanned > MAX_LINE:
            raise QmpProtocolError(f"line of more than {MAX_LINE} bytes")
        return messages


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QmpProtocolError(f"not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise QmpProtocolError(f"not an object: {line[:80]!r}")
    if "event" in message:
        data = message.get("data", {})
        return Event(str(message["event"]), data if isinstance(data, dict) else {})
    if "QMP" in message:
        return _greeting(message["QMP"], line)
    if "return" in message or "error" in message:
        return _reply(message, line)
    raise QmpProtocolError(f"neither greeting, reply nor event: {line[:80]!r}")


def _greeting(body: Any, line: bytes) -> Greeting:
    try:
        qemu = body["version"]["qemu"]
        version = (int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"]))
        return Greeting(version, str(body["version"].get("package", "")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QmpProtocolError(f"malformed greeting: {line[:80]!r}") from error


def _reply(message: dict[str, Any], line: bytes) -> Reply:
    number = message.get("id")
    if not isinstance(number, int):
        # QEMU answers without an id what it could not parse; we never send such a thing.
        raise QmpProtocolError(f"reply without an id: {line[:80]!r}")
    if "return" in message:
        return Reply(number, value=message["return"])
    error = message["error"]
    if not isinstance(error, dict):
        raise QmpProtocolError(f"malformed error: {line[:80]!r}")
    return Reply(
        number,
        error=str(error.get("desc", "unknown error")),
        error_class=str(error.get("class", "")),
    )
