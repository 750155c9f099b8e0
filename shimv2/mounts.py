# SPDX-License-Identifier: Apache-2.0
"""mount(2) and its younger relatives, by way of libc.

Every function raises `OSError` with the mount point as its filename; nothing here keeps
state.  Numbers are the kernel's (include/uapi/linux/mount.h); the system calls from
``open_tree`` on have the same number on every architecture.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_MANDLOCK = 0x40
MS_DIRSYNC = 0x80
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

PROPAGATION = MS_UNBINDABLE | MS_PRIVATE | MS_SLAVE | MS_SHARED

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1
_CLONE_FS = 0x200

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long


class _MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def mount(
    source: str | None,
    target: Path | str,
    fstype: str | None = None,
    flags: int = 0,
    data: str = "",
    *,
    chdir: str | None = None,
) -> None:
    """mount(2).

    Args:
        chdir: directory that relative paths in `data` start from.  The call is then made on
            a thread with a working directory of its own.
    """
    if chdir is None:
        _mount(source, target, fstype, flags, data)
        return
    failure: list[OSError] = []

    def run() -> None:
        try:
            if _libc.unshare(_CLONE_FS):
                raise _error(chdir)
            os.chdir(chdir)
            _mount(source, target, fstype, flags, data)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="mount")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def set_propagation(target: Path | str, flags: int) -> None:
    """Make a mount MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE (MS_REC for all below)."""
    _mount(None, target, None, flags, "")


def bind(
    source: Path | str,
    target: Path | str,
    *,
    readonly: bool = False,
    propagation: int = MS_PRIVATE,
) -> None:
    """Bind `source` with all mounts below it onto `target`.

    Flags are in force on every mount of the tree before it appears at `target`, so that the
    copies which propagation makes of it have them too (a remount would not reach those).

    Args:
        readonly: no mount of the tree can be written to.
        propagation: MS_PRIVATE, or MS_SLAVE to follow mounts made later below `source`.
    """
    tree = _libc.syscall(
        _SYS_OPEN_TREE,
        _AT_FDCWD,
        os.fsencode(source),
        ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE),
    )
    if tree < 0:
        raise _error(source)
    try:
        attributes = _MountAttr(
            attr_set=_MOUNT_ATTR_RDONLY if readonly else 0, propagation=propagation
        )
        if _libc.syscall(
            _SYS_MOUNT_SETATTR,
            int(tree),
            b"",
            ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE),
            ctypes.byref(attributes),
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        ):
            raise _error(target)
        if _libc.syscall(
            _SYS_MOVE_MOUNT,
            int(tree),
            b"",
            _AT_FDCWD,
            os.fsencode(target),
            ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
        ):
            raise _error(target)
    finally:
        os.close(tree)


def umount(target: Path | str, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags):
        raise _error(target)


def umount_detached(target: Path | str) -> None:
    """Detach the topmost mount at `target` with all below it, even while in use.  Nothing
    mounted there, or no such path, is no error; a symbolic link is never followed."""
    try:
        umount(target, MNT_DETACH | UMOUNT_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno != 22:  # EINVAL: not a mount point
            raise


def umount_all(target: Path | str) -> None:
    """Detach every mount stacked at `target`."""
    while is_mount_point(target):
        umount_detached(target)


def is_mount_point(target: Path | str) -> bool:
    """Whether something is mounted at `target` itself, bind mounts of files included."""
    wanted = os.path.realpath(target).encode()
    with open("/proc/self/mountinfo", "rb") as table:
        return any(_unescape(line.split(b" ", 5)[4]) == wanted for line in table)


def mount_points_below(directory: Path | str) -> list[str]:
    """Mount points at or below `directory`, in the order they were mounted."""
    prefix = os.path.realpath(directory).encode()
    found: list[str] = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            point = _unescape(line.split(b" ", 5)[4])
            if point == prefix or point.startswith(prefix + b"/"):
                found.append(os.fsdecode(point))
    return found


def _unescape(field: bytes) -> bytes:
    """Undo the octal escapes of /proc/self/mountinfo."""
    if b"\\" not in field:
        return field
    for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(code, char)
    return field


def _mount(
    source: str | None, target: Path | str, fstype: str | None, flags: int, data: str
) -> None:
    if _libc.mount(
        os.fsencode(source or "none"),
        os.fsencode(target),
        fstype.encode() if fstype else None,
        flags,
        os.fsencode(data) if data else None,
    ):
        raise _error(target)


def _error(path: Path | str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), os.fspath(path))
