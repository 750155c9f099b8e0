# SPDX-License-Identifier: Apache-2.0
"""The guest's console, line by line; what it prints is bounded, never trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

_LINE_LIMIT = 2048
_PER_SECOND = 500  # lines; a guest that floods its console must not cost the shim more


async def copy_console(path: Path, sink: Callable[[str], None]) -> None:
    """Connect to the VMM's console socket and give each line to `sink` until it closes."""
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError:
        return
    pending = b""
    window_end = trio.current_time() + 1
    count = 0
    async with stream:
        while True:
            try:
                data = await stream.receive_some(16384)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > _LINE_LIMIT:
                lines.append(pending)
                pending = b""
            for line in lines:
                count += 1
                text = line[:_LINE_LIMIT].decode(errors="replace").rstrip("\r")
                sink("".join(c if c.isprintable() else "?" for c in text))
            if count >= _PER_SECOND:
                # Not reading lets the VMM's buffer fill, which slows the guest's console only.
                await trio.sleep_until(window_end)
            if trio.current_time() >= window_end:
                window_end = trio.current_time() + 1
                count = 0
