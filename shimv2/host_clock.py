# SPDX-License-Identifier: Apache-2.0
"""Noticing that somebody has set this host's clock."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from types import TracebackType
from typing import Self

import trio

# sys/timerfd.h
_TFD_TIMER_ABSTIME = 1
_TFD_TIMER_CANCEL_ON_SET = 2
_NEVER = (1 << 62) // 1_000_000_000  # seconds since the epoch, as far as the kernel counts

_libc = ctypes.CDLL(None, use_errno=True)


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class HostClock:
    """Waits for a jump of the wall clock, by date(1), NTP or a resumed host (timerfd_create(2)).

    Leaving its ``with`` block closes its descriptor.

    Raises:
        OSError: the kernel has no more descriptors for us.
    """

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        flags = _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET
        spec = _Itimerspec((0, 0), (_NEVER, 0))
        if _libc.timerfd_settime(self._fd, flags, ctypes.byref(spec), None) < 0:
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    async def wait_set(self) -> None:
        """Until the clock is set; what happened since the last call counts."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                os.read(self._fd, 8)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ECANCELED:
                    raise
            return
