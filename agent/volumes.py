# SPDX-License-Identifier: Apache-2.0
"""Figures of mounted volumes, and file systems made on fresh ones."""

from __future__ import annotations

import os

from agent.waiting import Command
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.api import csi_pb2
    from agent.waiting import Work

MKFS = ("/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4")
# No journal and few inodes: the volume lives as long as the sandbox at most.
MKFS_OPTIONS = ("-F", "-q", "-O", "^has_journal", "-m", "0", "-i", "163840", "-I", "128")


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
