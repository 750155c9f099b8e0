# SPDX-License-Identifier: Apache-2.0
"""A container's root file system: containerd's list of mounts, mounted by the shim.

The mounts lie in the shim's own mount namespace, on ``bundle/rootfs``; each `Rootfs` ends
with the shim at the latest.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shimv2 import loop, mounts

if TYPE_CHECKING:
    from shimv2.mount_manager import Made, MountSpec

_PAGE = os.sysconf("SC_PAGESIZE")
_OPTIONS_ROOM = _PAGE - 512  # the kernel copies one page; it and overlay add a little
_HELPER_LIMIT = 10.0  # seconds for mount.fuse

# fstab option → (flags, whether it clears them)
_FLAGS: dict[str, tuple[int, bool]] = {
    "async": (mounts.MS_SYNCHRONOUS, True),
    "atime": (mounts.MS_NOATIME, True),
    "bind": (mounts.MS_BIND, False),
    "defaults": (0, False),
    "dev": (mounts.MS_NODEV, True),
    "diratime": (mounts.MS_NODIRATIME, True),
    "dirsync": (mounts.MS_DIRSYNC, False),
    "exec": (mounts.MS_NOEXEC, True),
    "mand": (mounts.MS_MANDLOCK, False),
    "noatime": (mounts.MS_NOATIME, False),
    "nodev": (mounts.MS_NODEV, False),
    "nodiratime": (mounts.MS_NODIRATIME, False),
    "noexec": (mounts.MS_NOEXEC, False),
    "nomand": (mounts.MS_MANDLOCK, True),
    "norelatime": (mounts.MS_RELATIME, True),
    "nostrictatime": (mounts.MS_STRICTATIME, True),
    "nosuid": (mounts.MS_NOSUID, False),
    "private": (mounts.MS_PRIVATE, False),
    "rbind": (mounts.MS_BIND | mounts.MS_REC, False),
    "relatime": (mounts.MS_RELATIME, False),
    "remount": (mounts.MS_REMOUNT, False),
    "ro": (mounts.MS_RDONLY, False),
    "rprivate": (mounts.MS_PRIVATE | mounts.MS_REC, False),
    "rshared": (mounts.MS_SHARED | mounts.MS_REC, False),
    "rslave": (mounts.MS_SLAVE | mounts.MS_REC, False),
    "runbindable": (mounts.MS_UNBINDABLE | mounts.MS_REC, False),
    "rw": (mounts.MS_RDONLY, True),
    "shared": (mounts.MS_SHARED, False),
    "slave": (mounts.MS_SLAVE, False),
    "strictatime": (mounts.MS_STRICTATIME, False),
    "suid": (mounts.MS_NOSUID, True),
    "sync": (mounts.MS_SYNCHRONOUS, False),
    "unbindable": (mounts.MS_UNBINDABLE, False),
}


class RootfsError(Exception):
    """A mount of the root file system can't be made; the message names it."""


class ParsedOptions:
    """Mount options sorted by who reads them.

    Attributes:
        flags: for mount(2), without propagation.
        propagation: MS_SHARED and the like, with MS_REC, or 0.
        data: what is left for the file system.
        loop, direct_io: the source is a file to be attached to a loop device.
    """

    __slots__ = ("data", "direct_io", "flags", "loop", "propagation")

    def __init__(self, options: Sequence[str]) -> None:
        self.flags = self.propagation = 0
        self.data: list[str] = []
        self.loop = self.direct_io = False
        for option in options:
            if option in _FLAGS:
                bits, clears = _FLAGS[option]
                if bits & mounts.PROPAGATION:
                    self.propagation = bits
                elif clears:
                    self.flags &= ~bits
                else:
                    self.flags |= bits
            elif option == "loop":
                self.loop = True
            elif option.startswith("X-containerd."):
                raise ValueError(f"option {option!r} is for containerd's mount manager")
            elif option.startswith(("uidmap=", "gidmap=")):
                raise ValueError(f"option {option!r}: id-mapped mounts are not supported")
            else:
                self.data.append(option)
        if self.loop and "direct-io" in self.data:
            self.data.remove("direct-io")
            self.direct_io = True


class Rootfs:
    """The mounts on one directory.

    Args:
        target: ``bundle/rootfs``; made if it is missing.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._mounted: list[Path] = []
        self._directories: list[Path] = []  # mount points of layers

    def mount(self, specs: Sequence[MountSpec]) -> None:
        """Make all `specs` in order; an empty list means the root file system is in place.

        Where the last one is in the form of containerd's mount manager, those before it are
        its layers: mounted beside the target, not on it.

        Raises:
            RootfsError: one failed, and those before it are undone.
        """
        try:
            if specs:
                self.target.mkdir(mode=0o711, exist_ok=True)
            elif not self.target.is_dir():
                raise RootfsError(f"root file system {self.target} is not a directory")
            if specs and "/" in specs[-1].type:
                self._mount_layered(specs)
            else:
                for spec in specs:
                    self._mount(spec, self._target_of(spec))
        except OSError as error:
            self.unmount()
            raise RootfsError(f"root file system {self.target}: {error.strerror}") from error
        except BaseException:
            self.unmount()
            raise

    def unmount(self) -> None:
        """Detach what `mount` made, in use or not.  Idempotent."""
        while self._mounted:
            mounts.umount_detached(self._mounted.pop())
        while self._directories:
            with contextlib.suppress(OSError):
                self._directories.pop().rmdir()

    def _mount_layered(self, specs: Sequence[MountSpec]) -> None:
        from shimv2.mount_manager import Made, plain  # rarely needed

        made: list[Made] = []
        directory = self.target.parent / "layers"
        for number, spec in enumerate(specs):
            is_last = number == len(specs) - 1
            point = self._target_of(spec) if is_last else directory / str(number)
            try:
                ready = plain(spec, made)
            except ValueError as error:
                raise RootfsError(_describe(spec, point, error)) from error
            for path, mode in ready.directories:
                _make_below(path, mode, directory)
            if not is_last:
                self._make_directory(directory)
                self._make_directory(point)
            self._mount(ready, point)
            made.append(Made(ready.source, spec.target, str(point)))

    def _make_directory(self, path: Path) -> None:
        if path not in self._directories:
            path.mkdir(mode=0o700, exist_ok=True)
            self._directories.append(path)

    def _mount(self, spec: MountSpec, target: Path) -> None:
        try:
            _mount_one(spec, target)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise RootfsError(_describe(spec, target, error)) from error
        self._mounted.append(target)

    def _target_of(self, spec: MountSpec) -> Path:
        inside = os.path.normpath("/" + spec.target.lstrip("/")).lstrip("/")
        return self.target / inside if inside else self.target


def _make_below(path: str, mode: int, directory: Path) -> None:
    """Directories are made in layers only: what a path leads to elsewhere is not ours."""
    if not os.path.normpath(path).startswith(f"{directory}/"):
        raise RootfsError(f"directory {path}: not below a layer of the root file system")
    os.makedirs(path, mode, exist_ok=True)


def _mount_one(spec: MountSpec, target: Path) -> None:
    if spec.type.startswith(("fuse.", "fuse3.")):
        _mount_fuse(spec, target)
        return
    options = ParsedOptions(spec.options)
    fstype = spec.type
    if fstype in ("bind", "rbind", "none", "") and not options.flags & mounts.MS_BIND:
        options.flags |= mounts.MS_BIND | (mounts.MS_REC if fstype == "rbind" else 0)
    if options.flags & mounts.MS_BIND and not options.flags & mounts.MS_REMOUNT:
        _bind(spec.source, target, options)
        return
    chdir, data = None, options.data
    if fstype == "overlay" and len(",".join(data)) >= _OPTIONS_ROOM:
        chdir, data = compact_lowerdirs(data)
    with contextlib.ExitStack() as devices:  # a mount keeps its loop devices
        source = spec.source
        if options.loop:
            readonly = bool(options.flags & mounts.MS_RDONLY)
            attached = loop.attached(source, readonly=readonly, direct_io=options.direct_io)
            source = devices.enter_context(attached)
        if fstype == "erofs":
            data = [_erofs_option(option, devices) for option in data]
        text = ",".join(data)
        if len(text) >= _PAGE:
            raise ValueError(f"mount options of {len(text)} bytes, more than a page")
        mounts.mount(source, target, fstype, options.flags, text, chdir=chdir)
    if options.propagation:
        mounts.set_propagation(target, options.propagation)


def _erofs_option(option: str, devices: contextlib.ExitStack) -> str:
    """The layers that a merged image refers to are files, where the kernel wants devices."""
    path = option.removeprefix("device=")
    if path == option or not os.path.isfile(path):
        return option
    return "device=" + devices.enter_context(loop.attached(path, readonly=True))


def _bind(source: str, target: Path, options: ParsedOptions) -> None:
    recursive = options.flags & mounts.MS_REC
    mounts.mount(source, target, None, mounts.MS_BIND | recursive)
    try:
        extra = options.flags & ~(mounts.MS_BIND | mounts.MS_REC)
        if extra:  # the first call ignores every other flag
            mounts.mount(None, target, None, mounts.MS_REMOUNT | mounts.MS_BIND | extra)
        if options.propagation:
            mounts.set_propagation(target, options.propagation)
    except OSError:
        mounts.umount_detached(target)
        raise


def _mount_fuse(spec: MountSpec, target: Path) -> None:
    helper, _, fstype = spec.type.partition(".")
    command = [f"mount.{helper}", spec.source, str(target)]
    for option in spec.options:
        command += ["-o", option]
    result = subprocess.run(
        [*command, "-t", fstype],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_HELPER_LIMIT,
        check=False,
    )
    if result.returncode:
        last = result.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise ValueError(f"{command[0]} ended with {result.returncode}: {' / '.join(last)}")


def compact_lowerdirs(data: Sequence[str]) -> tuple[str | None, list[str]]:
    """Shorten overlay options by making lowerdirs relative to a directory they share.

    Returns:
        (directory to mount from, options); (None, options unchanged) if they share none.
    """
    rest = [option for option in data if not option.startswith("lowerdir=")]
    lower = [option for option in data if option.startswith("lowerdir=")]
    paths = lower[0].removeprefix("lowerdir=").split(":") if len(lower) == 1 else []
    if len(paths) < 2 or not all(path.startswith("/") for path in paths):
        return None, list(data)
    common = os.path.commonpath(paths)
    if common == "/" or common in paths:
        return None, list(data)
    start = len(common) + 1
    return common, [*rest, "lowerdir=" + ":".join(path[start:] for path in paths)]


def _describe(spec: MountSpec, target: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    text = f"mount of {spec.type or 'bind'} {spec.source!r} on {target}: {reason}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        missing = [path for path in _paths_of(spec) if not os.path.exists(path)]
        if missing:
            text += f" ({', '.join(missing[:3])} does not exist)"
    return text[:1024]


def _paths_of(spec: MountSpec) -> list[str]:
    paths = [spec.source] if spec.source.startswith("/") else []
    for option in spec.options:
        key, _, value = option.partition("=")
        if key in ("lowerdir", "upperdir", "workdir", "device"):
            paths += value.split(":")
    return paths
