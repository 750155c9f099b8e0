# SPDX-License-Identifier: Apache-2.0
"""The character device of a macvtap, wherever its network namespace is.

Its node in the host's /dev is named by the interface's index, which is unique in its network
namespace only; the number that is unique stands in the sysfs of that namespace.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from shimv2 import mounts
from shimv2.namespaces import CLONE_NEWNS, unshare
from shimv2.network.tap import TapError, open_macvtap

_HIDDEN = Path("/sys")  # covered in a mount namespace of the calling thread's own


def open_queues(name: str, queues: int) -> list[int]:
    """Open a macvtap of the calling thread's network namespace.

    The thread gets a mount namespace of its own: let it end afterwards.

    Raises:
        TapError: names the device.
    """
    try:
        unshare(CLONE_NEWNS)
        mounts.set_propagation("/", mounts.MS_REC | mounts.MS_PRIVATE)
        mounts.mount("sysfs", str(_HIDDEN), "sysfs", mounts.MS_RDONLY)
        number = _device_number(name)
        mounts.mount("tmpfs", str(_HIDDEN), "tmpfs")
        node = str(_HIDDEN / name)
        os.mknod(node, stat.S_IFCHR | 0o600, number)
    except OSError as error:
        raise TapError(error.errno, f"macvtap {name}: {error.strerror}", error.filename) from None
    return open_macvtap(node, name, queues)


def _device_number(name: str) -> int:
    for path in (_HIDDEN / "class/net" / name).glob("tap*/dev"):
        major, _, minor = path.read_text().strip().partition(":")
        return os.makedev(int(major), int(minor))
    raise OSError(errno.ENODEV, "has no character device", name)
