# SPDX-License-Identifier: Apache-2.0
"""Storage objects of CreateSandbox and CreateContainer: file systems the host asks for.

One `Storages` per sandbox counts who uses which mount point. Whatever is mounted here is
unmounted here: when the last container that named it goes, or with the sandbox.
"""

from __future__ import annotations

import errno
import os
import stat

from agent import mounts, uevents
from agent.waiting import Command, Wait, breathe
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.api import agent_pb2
    from agent.waiting import Work
    from agent.watchable import Watchers

SHARE = "/run/kata-containers/shared/containers"
BUNDLES = "/run/kata-containers"
SHARE_TAG = "kataShared"

# A further disk that a file system on several of them is told of, as its option `device=`.
EXTRA_DEVICE = "io.katacontainers.volume.device"
CREATE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory"
OVERLAY_RW = "io.katacontainers.fs-opt.overlay-rw"
_NOT_FOR_THE_KERNEL = ("X-kata.", "io.katacontainers.")

_DISKS = ("blk", "mmioblk", "scsi", "nvdimm")
SYNC = "/usr/bin/sync"

# Emptydirs outlive the containers that use them: a restarted one finds its files again.
_FOR_THE_SANDBOX = ("ephemeral", "local")

DRIVERS = (
    "virtio-fs",
    "blk",
    "mmioblk",
    "scsi",
    "nvdimm",
    "overlayfs",
    "ephemeral",
    "local",
    "bind",
    "watchable-bind",
)


class _Entry:
    """One mount point: how many hold it, whether it goes with the sandbox only."""

    __slots__ = ("driver", "holders", "made", "mounted", "scratch", "settled", "sticky")

    def __init__(self, driver: str, sticky: bool) -> None:
        self.driver = driver
        self.holders = 1
        self.sticky = sticky
        self.mounted = False
        self.settled = False  # mounted or failed: nobody is at work on it any more
        self.made = False  # the mount point itself is ours, to be removed
        self.scratch: list[str] = []  # directories that go with it


class Storages:
    """The storages of a sandbox.

    attach: a generator of `agent.waiting` steps; detach and detach_all never wait.
    """

    def __init__(
        self, hotplug_timeout: float = 3.0, sysfs: str = "/sys", dev: str = "/dev"
    ) -> None:
        self.timeout = hotplug_timeout
        self._sysfs = sysfs
        self._dev = dev
        self._entries: dict[str, _Entry] = {}
        self._watchers: Watchers | None = None

    def attach_all(
        self, storages: Iterable[agent_pb2.Storage], container_id: str = ""
    ) -> Work[list[str]]:
        """Attach in order; if one fails, those before it are given back. Returns mount points."""
        points: list[str] = []
        try:
            for storage in storages:
                points.append((yield from self.attach(storage, container_id)))
        except BaseException:
            for point in reversed(points):
                self.detach(point)
            raise
        return points

    def attach(self, storage: agent_pb2.Storage, container_id: str = "") -> Work[str]:
        """Mount what `storage` says; returns its mount point, to be given to `detach`.

        Raises INVALID_ARGUMENT (unknown driver, bad option), UNIMPLEMENTED (a driver that only
        confidential guests have), DEADLINE_EXCEEDED (the device never came), INTERNAL (mount).
        """
        point = storage.mount_point
        if not point.startswith("/"):
            raise RpcError(
                Code.INVALID_ARGUMENT, f"storage mount_point {point!r} is not an absolute path"
            )
        point = os.path.normpath(point)
        entry = self._entries.get(point)
        if entry is not None:
            entry.holders += 1
            yield from self._until_settled(point, entry)
            return point
        driver = storage.driver
        entry = _Entry(driver, storage.shared or driver in _FOR_THE_SANDBOX)
        self._entries[point] = entry  # at once: the same one may be asked for while this waits
        try:
            yield from self._mount(storage, point, entry, container_id)
            if storage.HasField("fs_group"):
                yield from _apply_fs_group(
                    point,
                    storage.fs_group.group_id,
                    storage.fs_group.group_change_policy,
                    "ro" in storage.options,
                )
        except BaseException as error:
            self._entries.pop(point, None)
            self._undo(point, entry)
            if isinstance(error, OSError):
                raise RpcError(
                    Code.INTERNAL,
                    f"{driver} storage {storage.source!r} at {point}: {error}",
                ) from error
            raise
        finally:
            entry.settled = True
        return point

    def _until_settled(self, point: str, entry: _Entry) -> Work[None]:
        """Wait while another request is still at work on the same mount point."""
        if entry.settled:
            return
        yield Wait(f"storage at {point}", lambda: entry.settled, self.timeout + 5.0)
        if self._entries.get(point) is not entry:
            raise RpcError(Code.INTERNAL, f"storage at {point} failed for another request")

    def detach(self, point: str) -> None:
        """Give back one hold on a mount point; the last one unmounts. Unknown ones are ignored.

        Storages that belong to the sandbox stay until `detach_all`. Raises INTERNAL.
        """
        point = os.path.normpath(point)
        entry = self._entries.get(point)
        if entry is None:
            return
        entry.holders = max(0, entry.holders - 1)
        if entry.holders == 0 and not entry.sticky:
            del self._entries[point]
            self._undo(point, entry)

    def flush(self, points: Iterable[str] | None = None) -> Work[None]:
        """Have what was written to disks on them, before they are detached; all disks for None.

        In another process: it may take longer than the agent may be silent.
        """
        for point in list(self._entries) if points is None else points:
            entry = self._entries.get(os.path.normpath(point))
            if entry is not None and entry.driver in _DISKS and entry.mounted:
                yield Command([SYNC, "-f", point])

    def detach_all(self) -> list[str]:
        """Unmount everything, last first. Returns what could not be, as texts to log."""
        failures = []
        for point, entry in reversed(list(self._entries.items())):
            try:
                self._undo(point, entry)
            except RpcError as error:
                failures.append(error.message)
        self._entries.clear()
        return failures

    def mount_points(self) -> list[str]:
        return list(self._entries)

    def next_poll(self) -> float | None:
        """When (`time.monotonic()`) to call `poll`; None while nothing is watched."""
        return None if self._watchers is None else self._watchers.next_poll()

    def poll(self) -> None:
        """Bring the copies of watched directories up to date."""
        if self._watchers is not None:
            self._watchers.poll()

    def update_ephemeral(self, storages: Iterable[agent_pb2.Storage]) -> None:
        """UpdateEphemeralMounts: remount tmpfs with the options given (`remount,size=…`).

        Raises INVALID_ARGUMENT for another driver, NOT_FOUND for a path nothing is mounted on.
        """
        for storage in storages:
            if storage.driver != "ephemeral":
                raise RpcError(
                    Code.INVALID_ARGUMENT,
                    f"storage driver {storage.driver!r} at {storage.mount_point}:"
                    " only ephemeral ones can be updated",
                )
            point = storage.mount_point
            if not mounts.is_mount_point(point):
                raise RpcError(Code.NOT_FOUND, f"nothing is mounted at {point!r}")
            group, options = _take_option(storage.options, "fsgid")
            try:
                mounts.mount(
                    storage.source, point, storage.fstype or "tmpfs", ["remount", *options]
                )
                if group is not None:
                    _own(point, _id(group, "fsgid"))
            except OSError as error:
                raise RpcError(
                    Code.INTERNAL, f"remount of {point} with {options}: {error}"
                ) from error

    # Drivers. Each gets the normalised mount point and records in `entry` what is to be undone.

    def _mount(
        self, storage: agent_pb2.Storage, point: str, entry: _Entry, container_id: str
    ) -> Work[None]:
        driver = storage.driver
        if driver == "virtio-fs":
            yield from self._virtiofs(storage, point, entry)
        elif driver in _DISKS:
            if any(option.startswith("encryption_key=") for option in storage.driver_options):
                raise RpcError(
                    Code.UNIMPLEMENTED, f"{driver} storage at {point}: encrypted volumes"
                )
            node = yield from uevents.wait_block_device(
                driver, storage.source, self.timeout, self._sysfs, self._dev
            )
            yield from uevents.wait_for(
                f"{node} to open", lambda: uevents.opens(node), self.timeout
            )
            options = _kernel_options(storage.options)
            for option in storage.driver_options:
                key, _, value = option.partition("=")
                if key == "create_filesystem":
                    from agent.volumes import make_filesystem

                    yield from make_filesystem(node, storage.fstype)
                elif key == EXTRA_DEVICE:
                    extra = yield from uevents.wait_block_device(
                        driver, value, self.timeout, self._sysfs, self._dev
                    )
                    options.append(f"device={extra}")
            self._plain(node, storage.fstype, options, point, entry)
        elif driver == "overlayfs":
            self._overlay(storage, point, entry, container_id)
        elif driver == "ephemeral":
            self._ephemeral(storage, point, entry)
        elif driver == "local":
            self._local(storage, point, entry)
        elif driver == "bind":
            options = [*_kernel_options(storage.options)]
            if "bind" not in options and "rbind" not in options:
                options.append("bind")
            self._plain(storage.source, "bind", options, point, entry)
        elif driver == "watchable-bind":
            self._watchable(storage, point, entry)
        elif driver in ("image_guest_pull", "erofs.multi-layer", "blk-ccw", "9p"):
            raise RpcError(
                Code.UNIMPLEMENTED, f"storage driver {driver!r} at {point} is not supported"
            )
        else:
            raise RpcError(Code.INVALID_ARGUMENT, f"unknown storage driver {driver!r} at {point}")

    def _plain(
        self, source: str, fstype: str, options: list[str], point: str, entry: _Entry
    ) -> None:
        if fstype != "bind":  # runtimes pass a volume's OCI options on, where these two are usual
            options = [option for option in options if option not in ("bind", "rbind")]
        entry.made = _make_mount_point(point, source if fstype == "bind" else "")
        mounts.mount(source, point, fstype, options)
        entry.mounted = True

    def _virtiofs(self, storage: agent_pb2.Storage, point: str, entry: _Entry) -> Work[None]:
        """Mount a share. Its device may be plugged only now, so an unknown tag is waited for."""
        if storage.source == SHARE_TAG and mounts.is_mount_point(point):
            return
        entry.made = _make_mount_point(point)
        options = _kernel_options(storage.options)
        refused: list[OSError] = []

        def ready() -> bool:
            try:
                mounts.mount(storage.source, point, storage.fstype or "virtiofs", options)
            except OSError as error:
                if error.errno != errno.EINVAL:  # what virtiofs says of a tag it doesn't know
                    raise
                refused[:] = [error]
                return False
            return True

        try:
            yield from uevents.wait_for(f"virtio-fs tag {storage.source!r}", ready, self.timeout)
        except RpcError as error:
            raise RpcError(
                error.code,
                f"{error.message} (or options {options} are refused): {refused[0]}",
            ) from error
        entry.mounted = True

    def _overlay(
        self, storage: agent_pb2.Storage, point: str, entry: _Entry, container_id: str
    ) -> None:
        for option in storage.driver_options:
            key, _, path = option.partition("=")
            if key == CREATE_DIRECTORY:
                os.makedirs(path, exist_ok=True)
        options = _kernel_options(storage.options)
        if OVERLAY_RW in storage.options:
            if not container_id:
                raise RpcError(
                    Code.INVALID_ARGUMENT, f"option {OVERLAY_RW} at {point} needs a container"
                )
            for name in ("upper", "work"):
                directory = f"{BUNDLES}/{container_id}/{name}"
                os.makedirs(directory, exist_ok=True)
                entry.scratch.append(directory)
                options.append(f"{name}dir={directory}")
        self._plain(storage.source or "overlay", "overlay", options, point, entry)

    def _ephemeral(self, storage: agent_pb2.Storage, point: str, entry: _Entry) -> None:
        group, options = _take_option(_kernel_options(storage.options), "fsgid")
        if storage.fstype == "hugetlbfs":
            _reserve_hugepages(options, self._sysfs)
            # The size limits the mount; the pages are reserved for the whole guest.
            self._plain("nodev", "hugetlbfs", options, point, entry)
        else:
            source = storage.source or "tmpfs"
            try:
                self._plain(source, "tmpfs", options, point, entry)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise RpcError(
                        Code.INVALID_ARGUMENT, f"tmpfs at {point}: the kernel refuses {options}"
                    ) from error
                raise
        if group is not None:
            _own(point, _id(group, "fsgid"))

    def _local(self, storage: agent_pb2.Storage, point: str, entry: _Entry) -> None:
        group, options = _take_option(storage.options, "fsgid")
        mode, options = _take_option(options, "mode")
        os.makedirs(point, exist_ok=True)
        entry.made = True
        if mode is not None:
            try:
                bits = int(mode, 8)
            except ValueError:
                bits = -1
            if not 0 <= bits <= 0o7777:
                raise RpcError(Code.INVALID_ARGUMENT, f"local storage at {point}: mode={mode!r}")
            os.chmod(point, bits)
        if group is not None:
            _own(point, _id(group, "fsgid"))

    def _watchable(self, storage: agent_pb2.Storage, point: str, entry: _Entry) -> None:
        from agent.watchable import Watchers

        if self._watchers is None:
            self._watchers = Watchers()
        options = _kernel_options(storage.options)
        if self._watchers.add(storage.source, point, options):
            entry.made = entry.mounted = True
        else:  # too big to be copied time and again
            self._plain(storage.source, "bind", ["bind", *options], point, entry)

    def _undo(self, point: str, entry: _Entry) -> None:
        try:
            if self._watchers is not None:
                self._watchers.remove(point)
            if entry.mounted:
                mounts.unmount(point)
            if entry.made and os.path.lexists(point):
                if entry.driver == "local":
                    remove_tree(point)
                elif os.path.isdir(point):
                    _remove_if_empty(point)
                else:
                    os.unlink(point)
            for directory in entry.scratch:
                remove_tree(directory)
        except OSError as error:
            raise RpcError(Code.INTERNAL, f"unmount of {point}: {error}") from error


def _kernel_options(options: Iterable[str]) -> list[str]:
    """The options that mount(2) is to see; Kata's own markers are taken out."""
    return [option for option in options if not option.startswith(_NOT_FOR_THE_KERNEL)]


def _take_option(options: Iterable[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name=…`, and the other options, one each."""
    value = None
    rest = []
    for item in options:
        for option in item.split(","):
            key, equals, text = option.partition("=")
            if key == name and equals:
                value = text
            elif option:
                rest.append(option)
    return value, rest


def _id(text: str, name: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 32:
        raise RpcError(Code.INVALID_ARGUMENT, f"{name}={text!r} is not an id")
    return int(text)


def _own(path: str, group: int) -> None:
    """Give a directory to a group whose members' new files stay the group's."""
    os.chown(path, -1, group)
    os.chmod(path, (os.stat(path).st_mode & 0o7777) | 0o2070)


def _make_mount_point(point: str, bind_source: str = "") -> bool:
    """Make the directory (or file, for a file that is to be bound there). False: it was there."""
    if os.path.lexists(point):
        return False
    if bind_source and not os.path.isdir(bind_source) and os.path.exists(bind_source):
        os.makedirs(os.path.dirname(point), exist_ok=True)
        os.close(os.open(point, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    else:
        os.makedirs(point)
    return True


def _remove_if_empty(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def remove_tree(directory: str) -> None:
    """Remove a directory with all in it, by descriptors: no link in it leads elsewhere."""
    for _, directories, files, descriptor in os.fwalk(directory, topdown=False):
        for name in files:
            os.unlink(name, dir_fd=descriptor)
        for name in directories:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                os.rmdir(name, dir_fd=descriptor)
            else:
                os.unlink(name, dir_fd=descriptor)
    os.rmdir(directory)


def _reserve_hugepages(options: list[str], sysfs: str) -> None:
    """Have the kernel set aside the pages that a hugetlbfs mount of this size needs."""
    size, _ = _take_option(options, "size")
    page, _ = _take_option(options, "pagesize")
    if size is None or page is None or not size.isdigit() or int(size) == 0:
        raise RpcError(Code.INVALID_ARGUMENT, f"hugetlbfs options {options}: pagesize and size")
    page_kib = _size(page) >> 10
    control = f"{sysfs}/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages"
    try:
        with open(control, "r+", encoding="utf-8") as file:
            present = int(file.read())
            wanted = present + int(size) // (page_kib << 10)
            file.seek(0)
            file.write(str(wanted))
            file.flush()
            file.seek(0)
            got = int(file.read())
    except FileNotFoundError:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"pagesize={page}: the guest kernel has no such pages"
        ) from None
    if got < wanted:
        raise RpcError(
            Code.RESOURCE_EXHAUSTED, f"{wanted} huge pages of {page} wanted, the guest has {got}"
        )


def _size(text: str) -> int:
    """`2M`, `1Gi`, `2048` as bytes. Raises INVALID_ARGUMENT."""
    number = text.rstrip("KkMmGgiB")
    suffix = text[len(number) :][:1].upper()
    shift = {"": 0, "K": 10, "M": 20, "G": 30}.get(suffix)
    if not number.isdigit() or shift is None:
        raise RpcError(Code.INVALID_ARGUMENT, f"size {text!r}")
    return int(number) << shift


def _apply_fs_group(root: str, group: int, policy: int, read_only: bool) -> Work[None]:
    """Give all of a volume to a group. policy 1 (OnRootMismatch): not if the root shows it was."""
    want_file, want_directory = (0o440, 0o2550) if read_only else (0o660, 0o2770)
    status = os.stat(root)
    if policy == 1 and status.st_gid == group and status.st_mode & want_directory == want_directory:
        return
    count = 0
    for _, _, files, descriptor in os.fwalk(root, topdown=False):
        for name in files:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            os.chown(name, -1, group, dir_fd=descriptor, follow_symlinks=False)
            if not stat.S_ISLNK(status.st_mode):
                os.chmod(name, (status.st_mode & 0o7777) | want_file, dir_fd=descriptor)
        status = os.stat(descriptor)
        os.chown(descriptor, -1, group)
        os.chmod(descriptor, (status.st_mode & 0o7777) | want_directory)
        count += 1 + len(files)
        if count >= 256:
            count = 0
            yield breathe()
