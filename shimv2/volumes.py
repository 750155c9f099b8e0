# SPDX-License-Identifier: Apache-2.0
"""The mounts of a spec, one by one: shared over virtio-fs, made in the guest, or left out."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agent.api import agent_pb2
from shimv2 import share as shares
from shimv2.copies import Copies
from shimv2.spec import Mount, Spec
from shimv2.state import DIRECT_VOLUMES

if TYPE_CHECKING:
    from shimv2.direct_volumes import DirectVolume

SHM_DIR = "/run/kata-containers/sandbox/shm"
EPHEMERAL_DIR = "/run/kata-containers/sandbox/ephemeral"
DEFAULT_SHM_SIZE = 64 << 20  # bytes

WATCHED_DIR = "/run/kata-containers/sandbox/watchable"

_EMPTY_DIR = "kubernetes.io~empty-dir"
# Of a kubelet, which changes them while their containers run.
_WATCHED = tuple(
    f"kubernetes.io~{kind}" for kind in ("configmap", "secret", "projected", "downward-api")
)
_TMPFS_MAGIC = 0x01021994  # statfs(2)
_HUGETLBFS_MAGIC = 0x958458F6
_DNS_LIMIT = 64 << 10  # bytes of a resolv.conf
_FOLLOW = ("rslave", "rshared", "slave", "shared")

_libc = ctypes.CDLL(None, use_errno=True)


class DirectMount(NamedTuple):
    """A mount whose source stands for a disk.

    Attributes:
        source: the volume's path, as its record has it.
        position: of the mount among the guest's.
    """

    source: str
    mount: Mount
    record: DirectVolume
    position: int


class GuestMounts:
    """What `share_mounts` makes of a spec's mounts.

    Attributes:
        mounts: for the guest's spec, in order; of direct volumes not yet with their source.
        storages: to be mounted by the agent first.
        direct: direct volumes, whose disks are to be plugged.
        devices: mounts of block devices, which become devices of the spec.
        skipped: destinations left out, with the reason.
    """

    __slots__ = ("devices", "direct", "mounts", "skipped", "storages")

    def __init__(self) -> None:
        self.mounts: list[Mount] = []
        self.storages: list[agent_pb2.Storage] = []
        self.direct: list[DirectMount] = []
        self.devices: list[Mount] = []
        self.skipped: list[str] = []


def sandbox_storages(spec: Spec | None, *, share: bool = True) -> list[agent_pb2.Storage]:
    """The storages of CreateSandbox: the share, where there is one, and the pod's /dev/shm."""
    shared = agent_pb2.Storage(
        driver="virtio-fs",
        source=shares.TAG,
        fstype="virtiofs",
        options=["nodev"],
        mount_point=f"{shares.GUEST_DIR}/",
    )
    memory = agent_pb2.Storage(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        options=["noexec", "nosuid", "nodev", "mode=1777", f"size={shm_size(spec)}"],
        mount_point=SHM_DIR,
    )
    return [shared, memory] if share else [memory]


def share_mounts(spec: Spec, share: shares.Share | Copies, container_id: str) -> GuestMounts:
    """Share what has to be; on failure nothing of the container's mounts stays shared.

    Raises:
        ShareError: a source is missing or can't be shared; names it.
        DirectVolumeError: what is noted of a source can't be used.
    """
    result = GuestMounts()
    try:
        for mount in spec.mounts:
            _one(mount, spec, share, container_id, result)
    except BaseException:
        share.remove_container(container_id)
        raise
    return result


def dns_lines(spec: Spec) -> list[str]:
    """Lines of the resolv.conf that the spec mounts, for CreateSandbox; [] if it has none."""
    mount = spec.mount_at("/etc/resolv.conf")
    if mount is None:
        return []
    try:
        with open(mount.source, "rb") as file:
            text = file.read(_DNS_LIMIT).decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def shm_size(spec: Spec | None) -> int:
    """Bytes of the pod's /dev/shm: as large as the one the engine made on the host."""
    mount = spec.mount_at("/dev/shm") if spec is not None else None
    if mount is None or not mount.is_bind or filesystem_type(mount.source) != _TMPFS_MAGIC:
        return DEFAULT_SHM_SIZE
    return _capacity(mount.source) or DEFAULT_SHM_SIZE


def _one(
    mount: Mount,
    spec: Spec,
    share: shares.Share | Copies,
    container_id: str,
    result: GuestMounts,
) -> None:
    source = os.path.normpath(mount.source) if mount.source else ""
    if _is_pods_shm(mount, spec):
        result.mounts.append(Mount(mount.destination, "bind", SHM_DIR, ["rbind"]))
    elif not mount.is_bind or _below(source, "/proc") or _below(source, "/sys"):
        result.mounts.append(mount)  # the guest makes or has it
    elif (record := _direct_volume(mount.source)) is not None:
        result.direct.append(DirectMount(mount.source, mount, record, len(result.mounts)))
        result.mounts.append(mount)
    elif _is_block_device(source):
        result.devices.append(Mount(mount.destination, "bind", source, mount.options))
    elif source == "/dev" or (_below(source, "/dev") and not _shareable(source)):
        result.skipped.append(f"{mount.destination}: {mount.source} is a device of the host")
    elif _EMPTY_DIR in source and filesystem_type(source) == _TMPFS_MAGIC:
        result.storages.append(_memory_empty_dir(source))
        result.mounts.append(_bound(mount, f"{EPHEMERAL_DIR}/{os.path.basename(source)}"))
    elif _EMPTY_DIR in source and filesystem_type(source) == _HUGETLBFS_MAGIC:
        result.storages.append(_huge_empty_dir(source, spec))
        result.mounts.append(_bound(mount, f"{EPHEMERAL_DIR}/{os.path.basename(source)}"))
    else:
        where = share.add_mount(
            container_id,
            # A relative source starts from the bundle (runtime-spec, config.md#mounts).
            str(spec.bundle / mount.source),
            mount.destination,
            readonly=mount.readonly,
            follow=any(option in _FOLLOW for option in mount.options),
        )
        watched = any(f"/{kind}/" in f"{source}/" for kind in _WATCHED)
        if watched and isinstance(share, shares.Share):
            point = f"{WATCHED_DIR}/{where.name}"
            result.storages.append(_watched(str(where), point))
            result.mounts.append(_bound(mount, point))
        else:
            result.mounts.append(_bound(mount, str(where)))


def _is_pods_shm(mount: Mount, spec: Spec) -> bool:
    if os.path.normpath(mount.destination) != "/dev/shm":
        return False
    if mount.is_bind:  # what the engine made for the pod, but for a larger one that a user wants
        return _EMPTY_DIR not in mount.source
    # With the Sandbox API no engine makes one: each container is given a tmpfs of its own.
    return mount.type == "tmpfs" and bool(spec.namespaces.get("ipc"))


def _direct_volume(source: str) -> DirectVolume | None:
    if not os.path.isdir(DIRECT_VOLUMES):
        return None
    from shimv2 import direct_volumes

    return direct_volumes.find(source)


def _watched(source: str, point: str) -> agent_pb2.Storage:
    """Changes by the host cause no events in the guest: the agent keeps a copy that has them."""
    return agent_pb2.Storage(
        driver="watchable-bind", source=source, fstype="bind", options=["bind"], mount_point=point
    )


def _bound(mount: Mount, source: str) -> Mount:
    return Mount(mount.destination, "bind", source, mount.options)


def _memory_empty_dir(source: str) -> agent_pb2.Storage:
    storage = agent_pb2.Storage(
        driver="ephemeral",
        source="tmpfs",
        fstype="tmpfs",
        options=_fsgid(source),
        mount_point=f"{EPHEMERAL_DIR}/{os.path.basename(source)}",
    )
    if size := _capacity(source):
        storage.options.append(f"size={size}")
    return storage


def _huge_empty_dir(source: str, spec: Spec) -> agent_pb2.Storage:
    page = os.statvfs(source).f_bsize
    limits = _huge_page_limits(spec)
    return agent_pb2.Storage(
        driver="ephemeral",
        source="nodev",
        fstype="hugetlbfs",
        options=[f"pagesize={page}", f"size={limits.get(page, _capacity(source))}"],
        mount_point=f"{EPHEMERAL_DIR}/{os.path.basename(source)}",
    )


def _huge_page_limits(spec: Spec) -> dict[int, int]:
    """Bytes of a page → bytes allowed, from ``linux.resources.hugepageLimits``."""
    linux = spec.json.get("linux") or {}
    units = {"KB": 10, "MB": 20, "GB": 30}
    found: dict[int, int] = {}
    for entry in (linux.get("resources") or {}).get("hugepageLimits") or []:
        size = str(entry.get("pageSize", ""))
        if size[-2:] in units and size[:-2].isdigit():
            found[int(size[:-2]) << units[size[-2:]]] = int(entry.get("limit", 0))
    return found


def _fsgid(source: str) -> list[str]:
    gid = os.stat(source).st_gid
    return [f"fsgid={gid}"] if gid else []


def _capacity(path: str) -> int:
    info = os.statvfs(path)
    return info.f_blocks * info.f_frsize


def _is_block_device(source: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(source).st_mode)
    except OSError:
        return False


def _shareable(source: str) -> bool:
    """Regular files and directories below /dev are like any other (/dev/shm/…)."""
    try:
        mode = os.stat(source).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not _has_devices(source))


def _has_devices(directory: str) -> bool:
    """Whether it belongs to devtmpfs or devpts rather than to a file system for files."""
    return Path(directory).stat().st_dev in {
        Path(known).stat().st_dev for known in ("/dev", "/dev/pts") if Path(known).exists()
    }


def filesystem_type(path: str) -> int:
    """``f_type`` of statfs(2), 0 if there is nothing at `path`."""
    buffer = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    if _libc.statfs(os.fsencode(path), buffer):
        return 0
    return int(buffer[0]) & 0xFFFFFFFF


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + "/")
