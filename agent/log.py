# SPDX-License-Identifier: Apache-2.0
"""The agent's log: one line a message on the guest's console, which the host's shim copies.

With `agent.log_vport` each message goes to that port as well (`agent.log_port`).
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.log_port import LogPort

LEVELS = {"trace": 0, "debug": 1, "info": 2, "warning": 3, "error": 4, "critical": 5}
_LINE_LIMIT = 2000  # characters; the shim cuts there too

port: LogPort | None = None  # gets each message, too

_threshold = LEVELS["info"]


def set_level(name: str) -> None:
    """From now on messages below `name` are dropped."""
    global _threshold
    _threshold = LEVELS.get(name, LEVELS["info"])


def debug(message: str, **fields: Any) -> None:
    _write("debug", message, fields)


def info(message: str, **fields: Any) -> None:
    _write("info", message, fields)


def warning(message: str, **fields: Any) -> None:
    _write("warning", message, fields)


def error(message: str, **fields: Any) -> None:
    _write("error", message, fields)


def exception(raised: BaseException) -> None:
    """An error nobody foresaw, with its traceback on lines of its own."""
    import traceback

    _write("error", f"{type(raised).__name__}: {raised}", {})
    for part in traceback.format_exception(raised):
        for line in part.rstrip().splitlines():
            _write("error", line, {})


def _write(level: str, message: str, fields: dict[str, Any]) -> None:
    if LEVELS[level] < _threshold:
        return
    if port is not None:
        port.add(level, message[:_LINE_LIMIT], fields)
    extra = "".join(f" {name}={value}" for name, value in fields.items())
    line = f"agent {time.monotonic():.3f} {level}: {message}{extra}"[:_LINE_LIMIT]
    try:
        os.write(2, line.replace("\n", " | ").encode() + b"\n")
    except OSError:
        return  # no console, or one that is full: the agent's work goes on
