# SPDX-License-Identifier: Apache-2.0
"""Taps: network interfaces whose other end is a descriptor.

A tap lives as long as a descriptor of it, so it is gone with the VMM that holds the last one,
however that ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("network")

MAX_QUEUES = 256  # MAX_TAP_QUEUES of drivers/net/tun.c

_TUN = "/dev/net/tun"
VHOST_NET = Path("/dev/vhost-net")
_IFREQ = struct.Struct("16sH22x")

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFF_MULTI_QUEUE, _IFF_TUN_EXCL = 0x0100, 0x8000


class TapError(OSError):
    """A tap can't be made or opened."""


def open_tap(name: str, queues: int) -> list[int]:
    """Make a tap in the calling thread's network namespace.

    Returns:
        A descriptor (close-on-exec) for each queue pair; frames have a virtio-net header.

    Raises:
        TapError: names the device.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    if queues > 1:
        flags |= _IFF_MULTI_QUEUE
    with _closing_on_error() as found:
        for number in range(queues):
            exclusive = 0 if number else _IFF_TUN_EXCL
            try:
                fd = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                found.append(fd)
                fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags | exclusive))
            except OSError as error:
                raise TapError(error.errno, f"tap {name}: {error.strerror}", _TUN) from None
        return found


def open_macvtap(node: str, name: str, queues: int) -> list[int]:
    """Open queues of a macvtap that is there, by its character device `node`.

    Raises:
        TapError: names the device.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    if queues > 1:
        flags |= _IFF_MULTI_QUEUE
    with _closing_on_error() as found:
        for _ in range(queues):
            try:
                fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                found.append(fd)
                fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(b"", flags))
            except OSError as error:
                raise TapError(error.errno, f"macvtap {name}: {error.strerror}", node) from None
        return found


def open_vhost_net(queues: int, device: Path = VHOST_NET) -> list[int]:
    """A vhost-net instance for each queue.

    Returns:
        [] where it can't be used: QEMU moves the frames then, as it would by itself.
    """
    try:
        with _closing_on_error() as found:
            for _ in range(queues):
                found.append(os.open(device, os.O_RDWR | os.O_CLOEXEC))
            return found
    except FileNotFoundError:
        return []
    except OSError as error:  # a node without its module, or one that is not for us
        log.warning("%s: %s; the VM's network goes without it", device, error.strerror)
        return []


@contextlib.contextmanager
def _closing_on_error() -> Iterator[list[int]]:
    found: list[int] = []
    try:
        yield found
    except BaseException:
        for fd in found:
            os.close(fd)
        raise
