# SPDX-License-Identifier: Apache-2.0
"""Figures of mounted volumes, and file systems made on fresh ones."""

from __future__ import annotations

import os

from agent import mounts
from agent.waiting import Command, Wait
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.api import csi_pb2
    from agent.waiting import Work

MKFS = ("/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4")
# No journal and few inodes: the volume lives as long as the sandbox at most.
MKFS_OPTIONS = ("-F", "-q", "-O", "^has_journal", "-m", "0", "-i", "163840", "-I", "128")

_SECTOR = 512
_EXT4_IOC_RESIZE_FS = 0x40086610  # linux/ext4.h: _IOW('f', 16, __u64), blocks
_XFS_IOC_FSGROWFSDATA = 0x4010586E  # xfs_fs.h: _IOW('X', 110, struct xfs_growfs_data)
_XFS_INODES = 25  # per cent of the space at most; what mkfs.xfs takes for small ones


def volume_stats(path: str) -> csi_pb2.VolumeStatsResponse:
    """GetVolumeStats: bytes and inodes of the file system at `path`.

    Raises NOT_FOUND if nothing is there, INVALID_ARGUMENT for a relative path.
    """
    from agent.api import csi_pb2

    if not path.startswith("/"):
        raise RpcError(Code.INVALID_ARGUMENT, f"volume_guest_path {path!r} is not absolute")
    try:
        figures = os.statvfs(path)
    except FileNotFoundError:
        raise RpcError(Code.NOT_FOUND, f"volume_guest_path {path!r} does not exist") from None
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"volume_guest_path {path!r}: {error}") from error
    unit = csi_pb2.VolumeUsage
    size = figures.f_frsize
    response = csi_pb2.VolumeStatsResponse()
    response.usage.add(
        unit=unit.BYTES,
        total=figures.f_blocks * size,
        available=figures.f_bavail * size,
        used=(figures.f_blocks - figures.f_bfree) * size,
    )
    response.usage.add(
        unit=unit.INODES,
        total=figures.f_files,
        available=figures.f_favail,
        used=figures.f_files - figures.f_ffree,
    )
    response.volume_condition.abnormal = False
    return response


def make_filesystem(node: str, fstype: str) -> Work[None]:
    """Make a fresh file system on a disk. Raises INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL."""
    if fstype != "ext4":
        raise RpcError(Code.INVALID_ARGUMENT, f"create_filesystem of {fstype!r}: only ext4")
    for program in MKFS:
        if os.path.exists(program):
            break
    else:
        raise RpcError(Code.UNIMPLEMENTED, "create_filesystem: the guest image has no mkfs.ext4")
    done = yield Command([program, *MKFS_OPTIONS, node])
    assert done is not None
    if done.status != 0:
        detail = done.stderr.decode(errors="replace").strip()
        raise RpcError(Code.INTERNAL, f"mkfs.ext4 {node}: status {done.status}: {detail}")


def resize_volume(path: str, size: int, timeout: float, sysfs: str = "/sys") -> Work[None]:
    """ResizeVolume: let the mounted file system at `path` have `size` bytes of its disk.

    Raises NOT_FOUND (no mount), UNIMPLEMENTED (neither ext4 nor xfs), DEADLINE_EXCEEDED (the
    disk has not grown), INTERNAL.
    """
    found = [(source, fstype) for source, point, fstype in mounts.mounted() if point == path]
    if not found:
        raise RpcError(Code.NOT_FOUND, f"volume_guest_path {path!r}: nothing is mounted there")
    source, fstype = found[-1]
    if fstype not in ("ext4", "xfs"):
        raise RpcError(Code.UNIMPLEMENTED, f"volume at {path!r}: {fstype} can't grow")
    attribute = f"{sysfs}/class/block/{os.path.basename(source)}/size"

    def grown() -> bool:
        with open(attribute, encoding="ascii") as file:
            return int(file.read()) * _SECTOR >= size

    # The host's word of the new size may come a moment later than this request.
    yield Wait(f"{source} to have {size} bytes", grown, timeout)
    from fcntl import ioctl

    try:
        blocks = size // os.statvfs(path).f_bsize
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if fstype == "ext4":
                ioctl(directory, _EXT4_IOC_RESIZE_FS, blocks.to_bytes(8, "little"))
            else:
                percent = _XFS_INODES.to_bytes(8, "little")
                ioctl(directory, _XFS_IOC_FSGROWFSDATA, blocks.to_bytes(8, "little") + percent)
        finally:
            os.close(directory)
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"volume at {path!r} to {size} bytes: {error}") from error
