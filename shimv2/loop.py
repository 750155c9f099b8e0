# SPDX-License-Identifier: Apache-2.0
"""Loop devices: a file as a block device, gone by itself when the last user is.

Numbers: include/uapi/linux/loop.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16

# struct loop_config: fd, block_size, struct loop_info64 (device, inode, rdevice, offset,
# sizelimit; number, encrypt_type, encrypt_key_size, flags; file name, crypt name, key; init),
# reserved.
_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 64x")
_ATTEMPTS = 100  # somebody else may take the free device between the two calls


@contextlib.contextmanager
def attached(path: str, *, readonly: bool, direct_io: bool = False) -> Iterator[str]:
    """The block device of a loop over `path`.

    Inside the block the device is held; mounted within it, the device lives until that mount
    ends, otherwise only as long as the block.

    Raises:
        OSError: no loop device can be had, or `path` can't be opened.
    """
    mode = os.O_RDONLY if readonly else os.O_RDWR
    backing = os.open(path, mode | os.O_CLOEXEC)
    try:
        name, device = _attach(path, backing, mode, readonly=readonly, direct_io=direct_io)
    finally:
        os.close(backing)
    try:
        yield name
    finally:
        os.close(device)


def _attach(
    path: str, backing: int, mode: int, *, readonly: bool, direct_io: bool
) -> tuple[str, int]:
    flags = _LO_FLAGS_AUTOCLEAR
    flags |= _LO_FLAGS_READ_ONLY if readonly else 0
    flags |= _LO_FLAGS_DIRECT_IO if direct_io else 0
    config = _CONFIG.pack(
        backing, 0, *(0,) * 5, 0, 0, 0, flags, os.fsencode(path)[:63], b"", b"", 0, 0
    )
    with open("/dev/loop-control", "rb", buffering=0) as control:
        for _ in range(_ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(name, mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, error.strerror, path) from None
            else:
                return name, device
    raise OSError(errno.EBUSY, "no loop device could be had", path)
