# SPDX-License-Identifier: Apache-2.0
"""Our own terminal while it belongs to a shell in the lab."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import tty
from types import FrameType, TracebackType
from typing import Self


class Terminal:
    """In raw mode while entered."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._resized = False

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        self._handler = signal.signal(signal.SIGWINCH, self._on_resize)
        tty.setraw(self._fd)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGWINCH, self._handler)
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def size(self) -> tuple[int, int]:
        """(rows, columns)"""
        size = os.get_terminal_size(self._fd)
        return size.lines, size.columns

    def wait(self, other: socket.socket) -> tuple[bytes, bool]:
        """Until something is typed, `other` is readable or the size changed.

        Returns:
            What was typed, and whether the size is another one.
        """
        ready, _, _ = select.select([self._fd, other], [], [], 0.2)
        resized, self._resized = self._resized, False
        return (os.read(self._fd, 4096) if self._fd in ready else b""), resized

    def write(self, data: bytes) -> None:
        os.write(sys.stdout.fileno(), data)

    def _on_resize(self, number: int, frame: FrameType | None) -> None:
        self._resized = True
