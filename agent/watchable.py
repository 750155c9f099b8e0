# SPDX-License-Identifier: Apache-2.0
"""Copies of small directories of the share that containers can watch with inotify.

Changes that the host makes under virtio-fs cause no inotify events in the guest; ConfigMaps and
Secrets are reloaded on such events. So what the host shares is copied to a tmpfs, looked at
every two seconds, and what differs is copied again, new files first and stale ones last.
"""

from __future__ import annotations

import os
import stat
import time

from agent import mounts
from agent import syscalls as sys_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

INTERVAL = 2.0
MAX_ENTRIES = 16
MAX_BYTES = 1 << 20
COPIES = "/run/kata-containers/watchable-copies"

# What tells one version of an entry from another: kind and mode, size, mtime, inode or target.
_State = tuple[object, ...]


class _Watch:
    __slots__ = ("copy", "seen", "source")

    def __init__(self, source: str, copy: str) -> None:
        self.source = source
        self.copy = copy
        self.seen: dict[str, _State] = {}


class Watchers:
    """All watched sources of a sandbox, keyed by the mount point their copy is bound to."""

    def __init__(self, copies: str = "") -> None:
        self._copies = copies or COPIES
        self._watches: dict[str, _Watch] = {}
        self._next = 0.0
        self._serial = 0

    def add(self, source: str, point: str, options: Iterable[str]) -> bool:
        """Copy `source` (directory or file) and bind the copy to `point`.

        False, and nothing done, if it is more than 16 entries or 1 MiB. Raises OSError.
        """
        state = _scan(source)
        if state is None:
            return False
        if not self._watches:
            os.makedirs(self._copies, mode=0o700, exist_ok=True)
            mounts.mount("tmpfs", self._copies, "tmpfs", ["nosuid", "nodev", "mode=0700"])
        self._serial += 1
        copy = f"{self._copies}/{self._serial}"
        watch = _Watch(source, copy)
        self._watches[point] = watch
        try:
            _update(watch, state)
            if os.path.isdir(copy):
                os.makedirs(point, exist_ok=True)
            elif not os.path.exists(point):
                os.makedirs(os.path.dirname(point), exist_ok=True)
                os.close(os.open(point, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            mounts.mount(copy, point, "bind", ["bind", *options])
        except BaseException:
            self.remove(point)
            raise
        self._next = time.monotonic() + INTERVAL
        return True

    def remove(self, point: str) -> None:
        """Forget a mount point and its copy (unmounting `point` is the caller's). Unknown: no-op."""
        watch = self._watches.pop(point, None)
        if watch is None:
            return
        if not self._watches:
            sys_.umount(self._copies, sys_.MNT_DETACH)
            os.rmdir(self._copies)

    def next_poll(self) -> float | None:
        """The next `time.monotonic()` at which `poll` has something to do; None: never."""
        return self._next if self._watches else None

    def poll(self) -> None:
        """Bring every copy up to date if it is time. A source that can't be read is kept."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + INTERVAL
        for watch in self._watches.values():
            try:
                state = _scan(watch.source)
                if state is not None and state != watch.seen:
                    _update(watch, state)
            except OSError:
                continue


def _scan(source: str) -> dict[str, _State] | None:
    """Every entry below `source` ("" is itself) with its state; None if that is too much."""
    found: dict[str, _State] = {}
    total = 0
    pending = [""]
    while pending:
        name = pending.pop()
        path = f"{source}/{name}" if name else source
        status = os.lstat(path)
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            found[name] = (mode, os.readlink(path))
        elif stat.S_ISDIR(mode):
            found[name] = (mode, status.st_uid, status.st_gid)
            children = os.listdir(path)
            pending.extend(f"{name}/{child}" if name else child for child in children)
        elif stat.S_ISREG(mode):
            total += status.st_size
            times = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            found[name] = (mode, status.st_uid, status.st_gid, status.st_size, *times)
        else:
            return None  # a fifo or socket is of no use as a copy
        if len(found) + len(pending) > MAX_ENTRIES + 1 or total > MAX_BYTES:
            return None
    return found


def _update(watch: _Watch, state: dict[str, _State]) -> None:
    """Make the copy equal to what was scanned.

    Directories and files come before symbolic links: kubelet switches a whole volume by renaming
    the link `..data` to a new directory, and so does the copy.
    """
    links = []
    for name in sorted(state):
        if state[name] == watch.seen.get(name):
            continue
        mode = state[name][0]
        assert isinstance(mode, int)
        if stat.S_ISLNK(mode):
            links.append(name)
        elif stat.S_ISDIR(mode):
            _copy_directory(watch, name, mode)
        else:
            _copy_file(watch, name)
    for name in links:
        _copy_link(watch, name, str(state[name][1]))
    for name in sorted(set(watch.seen) - set(state), reverse=True):
        _remove(f"{watch.copy}/{name}")
    watch.seen = state


def _copy_directory(watch: _Watch, name: str, mode: int) -> None:
    path = f"{watch.copy}/{name}" if name else watch.copy
    source = f"{watch.source}/{name}" if name else watch.source
    if not os.path.isdir(path) or os.path.islink(path):
        if os.path.lexists(path):
            os.unlink(path)
        os.mkdir(path)
    status = os.lstat(source)
    os.chown(path, status.st_uid, status.st_gid)
    os.chmod(path, stat.S_IMODE(mode))


def _copy_link(watch: _Watch, name: str, target: str) -> None:
    def make(path: str) -> None:
        os.symlink(target, path)

    _replace(watch, name, make)


def _copy_file(watch: _Watch, name: str) -> None:
    source = f"{watch.source}/{name}" if name else watch.source
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        data = file.read(MAX_BYTES + 1)
        status = os.fstat(descriptor)

    def make(path: str) -> None:
        with open(path, "xb") as copy:
            copy.write(data)
        os.chown(path, status.st_uid, status.st_gid)
        os.chmod(path, stat.S_IMODE(status.st_mode))

    if name:
        _replace(watch, name, make)
    elif os.path.exists(watch.copy):  # a bound file has to be changed in place
        with open(watch.copy, "r+b") as copy:
            copy.write(data)
            copy.truncate()
    else:
        make(watch.copy)


def _replace(watch: _Watch, name: str, make: Callable[[str], None]) -> None:
    """Make a new entry beside the old one, then rename it over it: readers see either."""
    head, _, tail = name.rpartition("/")
    directory = f"{watch.copy}/{head}" if head else watch.copy
    fresh = f"{directory}/.new-{tail}"
    _remove(fresh)
    make(fresh)
    path = f"{directory}/{tail}"
    if os.path.isdir(path) and not os.path.islink(path):
        _remove(path)
    os.rename(fresh, path)


def _remove(path: str) -> None:
    """Remove whatever is at `path`, with all below it."""
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            _remove(f"{path}/{name}")
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)
