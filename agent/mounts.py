# SPDX-License-Identifier: Apache-2.0
"""Mounts by option lists, as fstab and the OCI spec spell them, and what is mounted now."""

from __future__ import annotations

import os

from agent import syscalls as sys_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# option: (flags to set, flags to clear)
_FLAGS: dict[str, tuple[int, int]] = {
    "defaults": (0, 0),
    "ro": (sys_.MS_RDONLY, 0),
    "rw": (0, sys_.MS_RDONLY),
    "nosuid": (sys_.MS_NOSUID, 0),
    "suid": (0, sys_.MS_NOSUID),
    "nodev": (sys_.MS_NODEV, 0),
    "dev": (0, sys_.MS_NODEV),
    "noexec": (sys_.MS_NOEXEC, 0),
    "exec": (0, sys_.MS_NOEXEC),
    "sync": (sys_.MS_SYNCHRONOUS, 0),
    "async": (0, sys_.MS_SYNCHRONOUS),
    "dirsync": (sys_.MS_DIRSYNC, 0),
    "remount": (sys_.MS_REMOUNT, 0),
    "mand": (sys_.MS_MANDLOCK, 0),
    "nomand": (0, sys_.MS_MANDLOCK),
    "noatime": (sys_.MS_NOATIME, 0),
    "atime": (0, sys_.MS_NOATIME),
    "nodiratime": (sys_.MS_NODIRATIME, 0),
    "diratime": (0, sys_.MS_NODIRATIME),
    "relatime": (sys_.MS_RELATIME, 0),
    "norelatime": (0, sys_.MS_RELATIME),
    "strictatime": (sys_.MS_STRICTATIME, 0),
    "nostrictatime": (0, sys_.MS_STRICTATIME),
    "lazytime": (sys_.MS_LAZYTIME, 0),
    "nolazytime": (0, sys_.MS_LAZYTIME),
    "iversion": (sys_.MS_I_VERSION, 0),
    "noiversion": (0, sys_.MS_I_VERSION),
    "nosymfollow": (sys_.MS_NOSYMFOLLOW, 0),
    "silent": (sys_.MS_SILENT, 0),
    "loud": (0, sys_.MS_SILENT),
    "bind": (sys_.MS_BIND, 0),
    "rbind": (sys_.MS_BIND | sys_.MS_REC, 0),
}

_PROPAGATION: dict[str, int] = {
    "private": sys_.MS_PRIVATE,
    "rprivate": sys_.MS_PRIVATE | sys_.MS_REC,
    "shared": sys_.MS_SHARED,
    "rshared": sys_.MS_SHARED | sys_.MS_REC,
    "slave": sys_.MS_SLAVE,
    "rslave": sys_.MS_SLAVE | sys_.MS_REC,
    "unbindable": sys_.MS_UNBINDABLE,
    "runbindable": sys_.MS_UNBINDABLE | sys_.MS_REC,
}


def parse_options(options: Iterable[str]) -> tuple[int, list[int], list[str]]:
    """Options as (flags, propagation changes in order, what the file system itself is told).

    An item may hold several options separated by commas.
    """
    flags = 0
    propagation: list[int] = []
    data: list[str] = []
    for item in options:
        for option in item.split(","):
            if option in _FLAGS:
                add, clear = _FLAGS[option]
                flags = (flags & ~clear) | add
            elif option in _PROPAGATION:
                propagation.append(_PROPAGATION[option])
            elif option:
                data.append(option)
    return flags, propagation, data


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount with an option list, in as many mount(2) calls as that takes. Raises OSError."""
    flags, propagation, data = parse_options(options)
    if fstype in ("bind", "rbind") and not flags & sys_.MS_BIND:
        flags |= sys_.MS_BIND | (sys_.MS_REC if fstype == "rbind" else 0)
    if flags & sys_.MS_BIND and not flags & sys_.MS_REMOUNT:
        sys_.mount(source, target, "", flags & (sys_.MS_BIND | sys_.MS_REC))
        wanted = flags & ~(sys_.MS_BIND | sys_.MS_REC | sys_.MS_SILENT)
        if wanted:  # the first call ignores every flag but these two
            sys_.mount("none", target, "", wanted | sys_.MS_BIND | sys_.MS_REMOUNT)
    else:
        sys_.mount(source or "none", target, fstype, flags, ",".join(data))
    for change in propagation:
        sys_.mount("none", target, "", change)


def unmount(target: str) -> None:
    """Unmount everything stacked on `target`, busy or not; nothing there is no error."""
    for _ in range(64):
        try:
            sys_.umount(target, sys_.UMOUNT_NOFOLLOW | sys_.MNT_DETACH)
        except (FileNotFoundError, OSError) as error:
            if error.errno in (2, 22):  # ENOENT, EINVAL: no mount point
                return
            raise


def is_mount_point(path: str) -> bool:
    """Whether something is mounted exactly on `path` (a directory or a file)."""
    real = os.path.realpath(path)
    return any(point == real for _, point, _ in mounted())


def mounted(mountinfo: str = "/proc/self/mountinfo") -> list[tuple[str, str, str]]:
    """What is mounted, in the order mounted: (source, mount point, fstype)."""
    found = []
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            fields = head.split(" ")
            fstype, source = tail.split(" ")[:2]
            found.append((_unescape(source), _unescape(fields[4]), fstype))
    return found


def _unescape(text: str) -> str:
    """Undo the octal escapes of blank, tab, newline, backslash and hash in mount tables."""
    if "\\" not in text:
        return text
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("043", "#")):
        text = text.replace("\\" + code, character)
    return text.replace("\\134", "\\")
