# SPDX-License-Identifier: Apache-2.0
"""What of the host's file system one sandbox sees: the directory served by virtiofsd.

On the host, below ``/run/kata-containers/shared/sandboxes/SID``::

    mounts/   a small tmpfs; each thing shared is bind-mounted below it
    shared/   the same once more, as a slave and read-only: what virtiofsd serves

Both are mounts of the shim's own mount namespace: after a SIGKILL only two empty directories
are left.  Nothing but what a container asked for is below them, and what the guest could
create in ``shared`` itself is nothing, since that mount is read-only.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from shimv2 import mounts

TAG = "kataShared"
GUEST_DIR = Path("/run/kata-containers/shared/containers")  # where the agent mounts the share

_SIZE = "4m"  # mount points only
_NAME_LIMIT = 64  # bytes of a destination's last part that go into a name


# What tells whether two shares are the same: path, device and inode, read-only, follow, and what
# is mounted below it, which one made later would see.
_Key = tuple[str, int, int, bool, bool, tuple[str, ...]]


class ShareError(Exception):
    """Something can't be shared with the guest; the message names it."""


class Share:
    """The shared directory of one sandbox.  A context manager; blocking calls, all short.

    Args:
        directory: ``…/sandboxes/SID``; made by `open`, removed by `close`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mounts = directory / "mounts"
        self._points: dict[str, list[Path]] = {}  # container → mount points, oldest first
        self._keys: dict[Path, _Key] = {}  # of those that several containers may have
        self._is_open = False

    @property
    def shared_dir(self) -> Path:
        """The directory for virtiofsd."""
        return self._directory / "shared"

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Make the two mounts, before virtiofsd starts.  Idempotent: a second VM has the same.

        Raises:
            ShareError: they can't be made.
        """
        if self._is_open:
            return
        try:
            for directory in (self._mounts, self.shared_dir):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            mounts.mount("kata-shared", self._mounts, "tmpfs", 0, f"mode=0755,size={_SIZE}")
            mounts.set_propagation(self._mounts, mounts.MS_SHARED)
            mounts.bind(self._mounts, self.shared_dir, readonly=True, propagation=mounts.MS_SLAVE)
        except OSError as error:
            self.close()
            raise ShareError(f"shared directory {error.filename}: {error.strerror}") from error
        self._is_open = True

    def close(self) -> None:
        """Detach everything and remove the directories.  Idempotent."""
        self._points.clear()
        self._keys.clear()
        self._is_open = False
        for directory in (self.shared_dir, self._mounts):
            with contextlib.suppress(OSError):
                mounts.umount_detached(directory)
        for directory in (self.shared_dir, self._mounts, self._directory):
            with contextlib.suppress(OSError):  # never more than an empty directory of ours
                directory.rmdir()

    def add_rootfs(self, container_id: str, rootfs: Path) -> Path:
        """Share a container's root file system, as it is mounted now.

        Returns:
            Where the guest finds it.

        Raises:
            ShareError: `rootfs` is missing or can't be bound.
        """
        if not rootfs.is_dir():
            raise ShareError(f"root file system {rootfs} of {container_id} is not a directory")
        parent = self._mounts / container_id
        parent.mkdir(mode=0o755, exist_ok=True)
        return self._add(container_id, rootfs, parent / "rootfs", False, mounts.MS_PRIVATE)

    def add_mount(
        self,
        container_id: str,
        source: str,
        destination: str,
        *,
        readonly: bool = False,
        follow: bool = False,
    ) -> Path:
        """Share one directory or one file, never its neighbours.

        What a container of the pod has already is shared once: in the guest the same file is then
        the same inode, as sockets and locks between containers need it.

        Args:
            destination: in the container; gives the shared name its end.
            readonly: also in every mount below `source`.
            follow: mounts made later on the host below `source` appear (rslave, rshared).

        Returns:
            Where the guest finds it.

        Raises:
            ShareError: `source` is missing or can't be bound.
        """
        target = self._mounts / shared_name(container_id, destination)
        propagation = mounts.MS_SLAVE if follow else mounts.MS_PRIVATE
        key = _identify(source, readonly, follow)
        known = next((point for point, other in self._keys.items() if other == key), None)
        if known is not None:
            if known not in (points := self._points.setdefault(container_id, [])):
                points.append(known)
            return GUEST_DIR / known.relative_to(self._mounts)
        where = self._add(container_id, Path(source), target, readonly, propagation)
        self._keys[target] = key
        return where

    def remove_container(self, container_id: str) -> None:
        """Detach all that was shared for a container; virtiofsd may still hold it open.

        Idempotent.
        """
        points = self._points.pop(container_id, [])
        for point in reversed(points):
            if any(point in others for others in self._points.values()):
                continue
            self._keys.pop(point, None)
            with contextlib.suppress(OSError):
                mounts.umount_detached(point)
            _remove_point(point)
        with contextlib.suppress(OSError):
            (self._mounts / container_id).rmdir()

    def _add(
        self, container_id: str, source: Path, target: Path, readonly: bool, propagation: int
    ) -> Path:
        try:
            if stat.S_ISDIR(source.stat().st_mode):
                target.mkdir(mode=0o755)
            else:
                target.touch(mode=0o644, exist_ok=False)
        except OSError as error:
            raise ShareError(f"sharing {source}: {error.strerror}") from error
        try:
            mounts.bind(source, target, readonly=readonly, propagation=propagation)
        except OSError as error:
            _remove_point(target)
            raise ShareError(f"sharing {source}: {error.strerror}") from error
        self._points.setdefault(container_id, []).append(target)
        return GUEST_DIR / target.relative_to(self._mounts)


def shared_name(container_id: str, destination: str) -> str:
    """A new name for what a container has at `destination`."""
    end = os.path.basename(destination.rstrip("/")) or "root"
    end = os.fsencode(end)[:_NAME_LIMIT].decode(errors="ignore")
    return f"{container_id}-{os.urandom(8).hex()}-{end}"


def _identify(source: str, readonly: bool, follow: bool) -> _Key:
    try:
        status = os.stat(source)
    except OSError as error:
        raise ShareError(f"sharing {source}: {error.strerror}") from error
    below = tuple(mounts.mount_points_below(source)) if stat.S_ISDIR(status.st_mode) else ()
    return os.path.realpath(source), status.st_dev, status.st_ino, readonly, follow, below


def _remove_point(point: Path) -> None:
    with contextlib.suppress(OSError):
        if point.is_dir():
            point.rmdir()
        else:
            point.unlink()
