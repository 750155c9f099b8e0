# SPDX-License-Identifier: Apache-2.0
"""System calls that Python 3.11–3.13 has no function for, by `_ctypes` alone.

`import ctypes` takes seven times as long as `_ctypes` (7 ms against 1 ms on the development
machine, several times that under TCG), and these few prototypes are all the agent needs of it.
Every function raises OSError with the errno, and with the path where there is one.
"""

from __future__ import annotations

import os
from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_USE_ERRNO,
    RTLD_LOCAL,
    CFuncPtr,
    _SimpleCData,
    addressof,
    dlopen,
    dlsym,
    get_errno,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# linux/reboot.h
REBOOT_RESTART = 0x01234567
REBOOT_POWER_OFF = 0x4321FEDC
REBOOT_HALT = 0xCDEF0123
REBOOT_CAD_OFF = 0x00000000

# linux/random.h
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207

# linux/timex.h
ADJ_OFFSET = 0x0001
ADJ_STATUS = 0x0010
ADJ_TIMECONST = 0x0020
ADJ_NANO = 0x2000
STA_PLL = 0x0001
STA_UNSYNC = 0x0040
STA_FREQHOLD = 0x0080
_TIMEX_SIZE = 208  # sizeof(struct timex) on 64-bit Linux


class _Int(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _UnsignedLong(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _CharPointer(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "z"


class _VoidPointer(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "P"


class _Char(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_libc = dlopen(None, RTLD_LOCAL)  # type: ignore[arg-type]  # None: what is loaded already
_functions: dict[str, Any] = {}
_PROTOTYPES: dict[str, tuple[type[Any], ...]] = {
    "mount": (_CharPointer, _CharPointer, _CharPointer, _UnsignedLong, _CharPointer),
    "umount2": (_CharPointer, _Int),
    "unshare": (_Int,),
    "setns": (_Int, _Int),
    "sethostname": (_CharPointer, _UnsignedLong),
    "reboot": (_Int,),
    "swapon": (_CharPointer, _Int),
    "swapoff": (_CharPointer,),
    "adjtimex": (_VoidPointer,),
}


def _call(name: str, *arguments: Any, path: str | None = None) -> int:
    function = _functions.get(name)
    if function is None:
        function = _functions[name] = _Function(dlsym(_libc, name))
        function.argtypes = _PROTOTYPES[name]
    result: int = function(*arguments)
    if result == -1:
        number = get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}", path)
    return result


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Empty fstype and data are passed as NULL."""
    _call(
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() or None,
        flags,
        os.fsencode(data) or None,
        path=target,
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _call("umount2", os.fsencode(target), flags, path=target)


def unshare(flags: int) -> None:
    """unshare(2): leave the namespaces named by CLONE_NEW* flags for new ones."""
    _call("unshare", flags)


def setns(descriptor: int, flags: int = 0) -> None:
    """setns(2): join the namespace that the descriptor of a /proc/PID/ns file names."""
    _call("setns", descriptor, flags)


def sethostname(name: str) -> None:
    """sethostname(2); the kernel refuses more than 64 bytes."""
    raw = name.encode()
    _call("sethostname", raw, len(raw))


def reboot(command: int) -> None:
    """reboot(2) with one of the REBOOT_* commands; returns only for REBOOT_CAD_OFF."""
    _call("reboot", command if command < 1 << 31 else command - (1 << 32))


def swapon(path: str) -> None:
    """swapon(2) with default priority."""
    _call("swapon", os.fsencode(path), 0, path=path)


def swapoff(path: str) -> None:
    """swapoff(2)."""
    _call("swapoff", os.fsencode(path), path=path)


def slew_clock(offset_ns: int) -> None:
    """Let the kernel work `offset_ns` (at most half a second either way) off CLOCK_REALTIME.

    The phase-locked loop with time constant 0 removes a quarter of what is left each second and
    then rests; its frequency is held, so that a single wrong value can't make the clock drift.
    """
    import struct

    modes = ADJ_OFFSET | ADJ_STATUS | ADJ_TIMECONST | ADJ_NANO
    status = STA_PLL | STA_FREQHOLD | STA_UNSYNC
    # struct timex up to `constant`: modes, offset, freq, maxerror, esterror, status, constant
    head = struct.pack("=I4xqqqqi4xq", modes, offset_ns, 0, 0, 0, status, 0)
    buffer: Any = (_Char * _TIMEX_SIZE)()
    buffer.raw = head.ljust(_TIMEX_SIZE, b"\0")
    _call("adjtimex", addressof(buffer))


def add_entropy(data: bytes) -> None:
    """Credit `data` to the kernel's entropy pool, then have its generator reseed from it."""
    import fcntl
    import struct

    descriptor = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
    try:
        request = struct.pack("ii", len(data) * 8, len(data)) + data
        fcntl.ioctl(descriptor, _RNDADDENTROPY, request)
        fcntl.ioctl(descriptor, _RNDRESEEDCRNG)
    finally:
        os.close(descriptor)
