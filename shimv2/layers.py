# SPDX-License-Identifier: Apache-2.0
"""Root file systems that the guest mounts from disks, instead of the host for it.

=================================  ==================================================
containerd's list                  in the guest
=================================  ==================================================
ext4, xfs … on a block device      a disk, mounted (devmapper)
ext4, erofs … of a file            a disk, mounted (blockfile, a view of an erofs layer)
[ext4 of a file], erofs × N,       a disk each, erofs shared by all containers that have
overlay by templates               the layer, and an overlay of them (erofs with block mode)
=================================  ==================================================

Everything else is mounted on the host and shared, also an overlay whose upper directory lies
on the host.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shimv2.mount_manager import PREFIX, Made, MountSpec, Plain, is_transformed, plain

FILESYSTEMS = frozenset(("ext2", "ext3", "ext4", "xfs", "erofs", "squashfs"))
"""What our guest's kernel, and Kata's, mounts from a disk."""

_FROM_FILES = frozenset(("erofs", "squashfs"))  # also without the option `loop`
_OF_THE_HOST = frozenset(("loop", "direct-io", "defaults"))
_DIRECTORY_KEYS = ("lowerdir=", "upperdir=", "workdir=")


@dataclass(frozen=True, slots=True)
class Layer:
    """A file system on a disk.

    Attributes:
        options: for the guest's mount.
        blobs: further disks that it refers to, in the order of its ``device=`` options.
    """

    path: Path
    fstype: str
    readonly: bool
    options: list[str]
    blobs: list[Path] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GuestRootfs:
    """What the guest makes a root file system of.

    Attributes:
        layers: in containerd's order.
        top: templates over the layers; None where the only layer is the root itself.
    """

    layers: list[Layer]
    top: MountSpec | None

    def overlay(self, points: Sequence[str]) -> Plain:
        """The overlay, its layers being mounted at `points`.  Only with a `top`."""
        assert self.top is not None
        return plain(self.top, _made(self.layers, points))


def guest_rootfs(mounts: Sequence[MountSpec]) -> GuestRootfs | None:
    """How the guest can make it of disks; None if it can't, and the host has to.

    Raises:
        ValueError: a mount makes no sense, wherever it is made.
    """
    if not mounts or any(spec.target for spec in mounts):
        return None
    *below, last = mounts
    if not below:
        only = _layer(last)
        return GuestRootfs([only], None) if only is not None else None
    layers = [layer for spec in below if (layer := _layer(spec)) is not None]
    if len(layers) < len(below) or not is_transformed(last):
        return None
    rootfs = GuestRootfs(layers, last)
    points = [f"/{index}" for index in range(len(layers))]
    overlay = rootfs.overlay(points)
    if overlay.type != "overlay" or not _stays_below(overlay, points):
        return None
    return rootfs


def _layer(spec: MountSpec) -> Layer | None:
    if spec.type not in FILESYSTEMS:
        return None
    for option in spec.options:
        if option.startswith(PREFIX):
            raise ValueError(f"{spec.type} {spec.source!r}: option {option!r} is not supported")
    try:
        mode = os.stat(spec.source).st_mode
    except OSError:
        return None  # the host's mount will tell
    from_file = "loop" in spec.options or spec.type in _FROM_FILES
    if not stat.S_ISBLK(mode) and not (stat.S_ISREG(mode) and from_file):
        return None
    said = [option for option in spec.options if option in ("ro", "rw")]
    readonly = bool(said and said[-1] == "ro") or spec.type in _FROM_FILES
    blobs = [o.removeprefix("device=") for o in spec.options if o.startswith("device=")]
    return Layer(
        Path(spec.source),
        spec.type,
        readonly,
        [o for o in spec.options if o not in _OF_THE_HOST and not o.startswith("device=")],
        [Path(blob) for blob in blobs],
    )


def _made(layers: Sequence[Layer], points: Sequence[str]) -> list[Made]:
    return [Made(str(layer.path), "", p) for layer, p in zip(layers, points, strict=True)]


def _stays_below(overlay: Plain, points: Sequence[str]) -> bool:
    """Whether all its directories are those of the layers."""
    paths = [path for path, _ in overlay.directories]
    for option in overlay.options:
        key = next((key for key in _DIRECTORY_KEYS if option.startswith(key)), None)
        if key is not None:
            paths += option.removeprefix(key).split(":")
    return all(any(f"{path}/".startswith(f"{p}/") for p in points) for path in paths if path)
