# SPDX-License-Identifier: Apache-2.0
"""Kernel vhost-vsock: the host kernel is the device, AF_VSOCK sockets reach it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vmm.errors import CapacityError, UnsupportedError
from vmm.hypervisor import VsockDevice
from vmm.vsock.channel import (
    CONNECT_TIMEOUT,
    VsockChannel,
    VsockConnection,
    VsockNoAnswer,
    VsockRefused,
)

DEVICE = Path("/dev/vhost-vsock")
#: _IOW(0xAF, 0x60, __u64), linux/vhost.h
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
FIRST_CID = 3
_LAST_CID = 0x7FFF_FFFF
_TRIES = 64

#: No answer (yet): nobody listens, the driver is not up, or the VMM has not started the device.
_REFUSALS = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ENODEV,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EPIPE,
    }
)

Ioctl = Callable[[int, int, bytes], object]


def available(device: Path = DEVICE) -> bool:
    """True if the device can be opened by us."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def claim_cid(fd: int, ioctl: Ioctl = fcntl.ioctl) -> int:
    """Give an open vhost-vsock descriptor a CID that no other VM of this host has.

    Raises:
        CapacityError: none was free.
        UnsupportedError: the kernel does not take the request.
    """
    for _ in range(_TRIES):
        cid = FIRST_CID + int.from_bytes(os.urandom(4), "little") % (_LAST_CID - FIRST_CID)
        try:
            ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UnsupportedError(f"{DEVICE}: no guest CID can be set: {error}") from error
        else:
            return cid
    raise CapacityError(f"{DEVICE}: {_TRIES} guest CIDs tried, all in use")


class VhostChannel(VsockChannel):
    """Connects by AF_VSOCK.

    Args:
        device: the vhost-vsock node.
        ioctl, make_socket: what stands for the kernel.
    """

    def __init__(
        self,
        device: Path = DEVICE,
        *,
        ioctl: Ioctl = fcntl.ioctl,
        make_socket: Callable[[], trio.socket.SocketType] | None = None,
    ) -> None:
        super().__init__()
        self._node = device
        self._ioctl = ioctl
        self._make_socket = make_socket or _vsock_socket
        self._fd = -1
        self._cid = 0

    @property
    def device(self) -> VsockDevice:
        return VsockDevice(id="vsock0", cid=self._cid, vhost_fd=self._fd)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        try:
            self._fd = os.open(self._node, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UnsupportedError(f"{self._node}: {error.strerror}") from error
        try:
            self._cid = claim_cid(self._fd, self._ioctl)
            async with super()._open():
                yield
        finally:
            os.close(self._fd)
            self._fd = -1

    async def _connect(self, port: int) -> VsockConnection:
        sock = self._make_socket()
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await sock.connect((self._cid, port))
            _, host_port = sock.getsockname()
            return VsockConnection(trio.SocketStream(sock), host_port)
        except trio.TooSlowError:
            sock.close()
            raise VsockNoAnswer(f"guest port {port}: no answer") from None
        except OSError as error:
            sock.close()
            if error.errno == errno.ETIMEDOUT:
                raise VsockNoAnswer(f"guest port {port}: no answer") from None
            if error.errno in _REFUSALS:
                raise VsockRefused(f"guest port {port}: {error.strerror}") from None
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                sock.close()
            raise


def _vsock_socket() -> trio.socket.SocketType:
    # The kernel gives up after 2 s (ETIMEDOUT); Python can't set another limit, since it takes
    # each option of an AF_VSOCK socket for a number.
    return trio.socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
