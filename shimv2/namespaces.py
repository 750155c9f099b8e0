# SPDX-License-Identifier: Apache-2.0
"""Linux namespaces of the shim: its own mount namespace, and network namespaces for pods."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shimv2 import mounts

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_NS_GET_NSTYPE = 0xB703  # ioctl_ns(2)

_T = TypeVar("_T")

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OSError):
    """A path is not a namespace, or not one that can be used."""


def enter_own_mount_namespace() -> int:
    """Move this process into a mount namespace of its own.

    ``/`` becomes a recursive slave of the host's (nothing we mount shows outside, what the
    host mounts shows here), then recursively shared, so that later mounts of ours reach the
    namespace that virtiofsd makes for itself.  Call it before the first thread starts.

    Returns:
        A descriptor (close-on-exec) of the mount namespace left, for hooks and loggers.
    """
    host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNS)
        mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SLAVE)
        mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SHARED)
    except BaseException:
        os.close(host)
        raise
    return host


def new_network_namespace() -> int:
    """A network namespace nobody is in, with its loopback interface up.

    It lives as long as the returned descriptor (close-on-exec; ``/proc/self/fd/N`` is a path
    to it) or a process in it.
    """

    def make() -> int:
        unshare(CLONE_NEWNET)
        _loopback_up()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    try:
        return _on_own_thread(make)
    except OSError as error:
        raise NamespaceError(error.errno, f"new network namespace: {error.strerror}") from None


def call_inside(fd: int, work: Callable[[], _T]) -> _T:
    """Call `work` in the network namespace behind `fd`; sockets that it makes belong there.

    Raises:
        OSError: setns(2) failed; besides that whatever `work` raises.
    """

    def enter() -> _T:
        setns(fd, CLONE_NEWNET)
        return work()

    return _on_own_thread(enter)


def _on_own_thread(work: Callable[[], _T]) -> _T:
    """For what changes the calling thread for good."""
    found: list[_T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return found[0]


def open_network_namespace(path: Path | str) -> int:
    """A descriptor (close-on-exec) of the network namespace at `path`.

    Raises:
        NamespaceError: there is nothing there, or something else than a network namespace.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NamespaceError(
            error.errno, f"network namespace: {error.strerror}", str(path)
        ) from None
    if not _is_network_namespace(fd):
        os.close(fd)
        raise NamespaceError(22, "not a network namespace", str(path))
    return fd


def is_host_network(path: Path | str) -> bool:
    """Whether `path` leads to the network namespace the host, or this process, itself is in."""
    try:
        wanted = os.stat(path)
    except OSError:
        return False
    for own in ("/proc/self/ns/net", "/proc/1/ns/net"):
        with contextlib.suppress(OSError):
            if os.path.samestat(wanted, os.stat(own)):
                return True
    return False


def unshare(flags: int) -> None:
    """unshare(2) for the calling thread."""
    if _libc.unshare(flags):
        raise _error("unshare")


def setns(fd: int, kind: int) -> None:
    """setns(2) for the calling thread.  Safe between fork and exec."""
    if _libc.setns(fd, kind):
        raise _error("setns")


def _is_network_namespace(fd: int) -> bool:
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))  # struct ifreq
        fcntl.ioctl(control, _SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | _IFF_UP)
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
