# SPDX-License-Identifier: Apache-2.0
"""The guest's wall clock, kept by the host: stepped when it is far off, else slewed."""

from __future__ import annotations

import os
import time

from agent import syscalls as sys_
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.api import agent_pb2

_SECOND = 1_000_000_000
MAX_SLEW = 500_000_000  # what the kernel's loop accepts at once (MAXPHASE)
PTP_INTERVAL = 16.0
_CLOCK_FD = 3  # low bits of a dynamic clock id made of a descriptor


def set_date_time(request: agent_pb2.SetGuestDateTimeRequest, *, idle: bool = False) -> None:
    """SetGuestDateTime. Raises INVALID_ARGUMENT, INTERNAL.

    idle: no container is there yet that a jump could harm, so the clock is right at once.
    """
    if request.Sec < 0 or not 0 <= request.Usec < 1_000_000:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"date and time: Sec={request.Sec} Usec={request.Usec}"
        )
    try:
        adjust(request.Sec * _SECOND + request.Usec * 1000, always_step=idle)
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"date and time: {error}") from error


def adjust(now_ns: int, *, always_step: bool = False) -> str:
    """Make the wall clock `now_ns` since the epoch. Returns `step` or `slew`.

    Programs take a jump badly, so only more than a second is worth one. Between half a second
    and a second the kernel takes the first half now, the rest with the next call.
    """
    offset = now_ns - time.time_ns()
    if always_step or abs(offset) > _SECOND:
        time.clock_settime_ns(time.CLOCK_REALTIME, now_ns)
        return "step"
    sys_.slew_clock(max(-MAX_SLEW, min(MAX_SLEW, offset)))
    return "slew"


def reseed(data: bytes) -> None:
    """ReseedRandomDev: credit the host's random bytes and have the generator use them now."""
    if not data:
        raise RpcError(Code.INVALID_ARGUMENT, "data to reseed from is empty")
    try:
        sys_.add_entropy(data)
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"reseed of the random device: {error}") from error


class HostClock:
    """The host's wall clock through ptp_kvm: `sync()` every PTP_INTERVAL seconds."""

    def __init__(self, device: str) -> None:
        self._descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)

    def sync(self) -> str:
        """Adjust the guest's clock to the host's; `step` or `slew`. Raises OSError."""
        return adjust(time.clock_gettime_ns((~self._descriptor << 3) | _CLOCK_FD))

    def close(self) -> None:
        os.close(self._descriptor)


def host_clock(sysfs: str = "/sys", dev: str = "/dev") -> HostClock | None:
    """The ptp_kvm clock if this guest has one (under KVM with the driver), else None."""
    try:
        names = sorted(os.listdir(f"{sysfs}/class/ptp"))
    except OSError:
        return None
    for name in names:
        try:
            with open(f"{sysfs}/class/ptp/{name}/clock_name", encoding="utf-8") as file:
                if file.read().strip() == "KVM virtual PTP":
                    return HostClock(f"{dev}/{name}")
        except OSError:
            continue
    return None
