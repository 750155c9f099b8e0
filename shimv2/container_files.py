# SPDX-License-Identifier: Apache-2.0
"""What a container has of the host's storage: its root file system, volumes and disks.

First the host's part, which needs no guest: mounts, and what is shared of them.  Then the
disks, which need a VM; what they become in the guest is made of the storages and devices that
go with CreateContainer.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.api import agent_pb2, oci_pb2, types_pb2
from shimv2 import block_devices
from shimv2.copies import Call, Copies
from shimv2.drives import Drive, Drives
from shimv2.guest_spec import device_rules, resources_of
from shimv2.rootfs import Rootfs, RootfsError
from shimv2.share import Share
from shimv2.spec import Mount, Spec
from shimv2.volumes import DirectMount, share_mounts

if TYPE_CHECKING:
    from shimv2.layers import GuestRootfs, Layer

log = logging.getLogger("container")

BUNDLES = "/run/kata-containers"  # of the agent
LAYERS = f"{BUNDLES}/sandbox/layers"
STORAGE = f"{BUNDLES}/sandbox/storage"
EXTRA_DEVICE = "io.katacontainers.volume.device="
CREATE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory="

_OF_DIRECTORIES = ("overlay", "bind")
_POLICIES = {"Always": types_pb2.Always, "OnRootMismatch": types_pb2.OnRootMismatch}


class ContainerFiles:
    """Of one container.

    Args:
        share: of its sandbox, or the container's own `Copies`.
        sandbox_id: notes who uses a direct volume.

    Attributes:
        root_path: of the root file system, in the guest.
        mounts: for the guest's spec.
        storages, devices: for CreateContainer.
    """

    def __init__(
        self, share: Share | Copies, spec: Spec, container_id: str, bundle: str, sandbox_id: str
    ) -> None:
        self._share = share
        self._spec = spec
        self._id = container_id
        self._sandbox_id = sandbox_id
        self._target = spec.rootfs or Path(bundle, "rootfs")
        self._rootfs = Rootfs(self._target)
        self._in_guest: GuestRootfs | None = None
        self._direct: list[DirectMount] = []
        self._devices: list[Mount] = []
        self._drives: Drives | None = None
        self.root_path = f"{BUNDLES}/{container_id}/rootfs"
        self.mounts: list[Mount] = []
        self.storages: list[agent_pb2.Storage] = []
        self.devices: list[agent_pb2.Device] = []

    def mount(self, mounts: list[Any], *, disks: bool) -> None:
        """The host's part.  On an error call `release`.

        Args:
            mounts: containerd's, for the root file system.
            disks: whether a root file system may be a disk.

        Raises:
            RootfsError, ShareError, DirectVolumeError: names what can't be had.
        """
        if disks and mounts and mounts[-1].type not in _OF_DIRECTORIES:
            from shimv2.layers import guest_rootfs  # rarely needed

            try:
                self._in_guest = guest_rootfs(mounts)
            except ValueError as error:
                raise RootfsError(f"root file system: {error}") from error
        if self._in_guest is None:
            self._rootfs.mount(mounts)
            self.root_path = str(self._share.add_rootfs(self._id, self._target))
        shared = share_mounts(self._spec, self._share, self._id)
        for reason in shared.skipped:
            log.warning("mount left out: %s", reason)
        for mount in self._spec.mounts:
            if mount.is_bind and not {"shared", "rshared"}.isdisjoint(mount.options):
                log.warning(
                    "mount %s: what the container mounts there does not reach the host",
                    mount.destination,
                )
        self.mounts, self.storages = shared.mounts, shared.storages
        self._direct, self._devices = shared.direct, shared.devices
        for volume in self._direct:
            readonly = volume.record.readonly or volume.mount.readonly
            self.mounts[volume.position] = Mount(
                volume.mount.destination,
                "bind",
                direct_mount_point(volume.source),
                ["rbind", "ro" if readonly else "rw"],
            )

    async def plug(self, drives: Drives, oci: oci_pb2.Spec) -> None:
        """The disks.  On an error call `unplug` and `release`.

        Args:
            oci: for the guest; gets the block devices that it is to have.

        Raises:
            DriveError, VmmError: names what can't be had.
        """
        self._drives = drives
        if self._in_guest is not None:
            await self._plug_rootfs(self._in_guest, drives)
        for volume in self._direct:
            await self._plug_volume(volume, drives)
        self.devices += await block_devices.plug(
            oci,
            device_rules(self._spec),
            resources_of(self._spec).BlockIO,
            self._devices,
            drives,
            self._id,
        )

    async def copy(self, call: Call) -> None:
        """Where nothing is shared, copy what would be.

        Raises:
            ShareError, RpcError: names what can't be copied.
        """
        if isinstance(self._share, Copies):
            await self._share.send(call)

    async def unplug(self) -> None:
        """After the guest has forgotten the container.  Idempotent."""
        if self._drives is not None:
            await self._drives.release(self._id)

    def release(self) -> None:
        """Let go of what the host holds.  Idempotent."""
        try:
            self._share.remove_container(self._id)
        finally:
            self._rootfs.unmount()
            for volume in self._direct:
                self._disclaim(volume.source)

    def _disclaim(self, source: str) -> None:
        if self._drives is None or not self._drives.drop_volume(source, self._id):
            return
        from shimv2 import direct_volumes

        with contextlib.suppress(OSError):
            direct_volumes.disclaim(source, self._sandbox_id)

    def has_volume(self, source: str) -> bool:
        """Whether a direct volume with this path is one of its mounts, plugged."""
        return self._drives is not None and any(v.source == source for v in self._direct)

    async def grow(self, source: str, size: int) -> None:
        """The disk of a direct volume has grown on the host; tell the guest.

        Raises:
            DriveError: it has less than `size` bytes.
            VmmError: the VMM refused it.
        """
        assert self._drives is not None
        for volume in self._direct:
            if volume.source == source:
                await self._drives.grow(volume.record.device, size)

    async def _plug_rootfs(self, rootfs: GuestRootfs, drives: Drives) -> None:
        points = []
        for layer in rootfs.layers:
            storage = await self._plug_layer(layer, drives)
            if rootfs.top is None:
                storage.mount_point = self.root_path
            points.append(storage.mount_point)
            self.storages.append(storage)
        if rootfs.top is None:
            return
        overlay = rootfs.overlay(points)
        self.storages.append(
            agent_pb2.Storage(
                driver="overlayfs",
                source="overlay",
                fstype="overlay",
                options=overlay.options,
                driver_options=[CREATE_DIRECTORY + path for path, _ in overlay.directories],
                mount_point=self.root_path,
            )
        )

    async def _plug_layer(self, layer: Layer, drives: Drives) -> agent_pb2.Storage:
        drive = await drives.plug(layer.path, self._id, readonly=layer.readonly)
        blobs = [await drives.plug(blob, self._id, readonly=True) for blob in layer.blobs]
        where = f"{LAYERS}/{drive.id}" if layer.readonly else f"{BUNDLES}/{self._id}/layer"
        storage = _storage(drive, layer.fstype, layer.options, where)
        storage.driver_options.extend(EXTRA_DEVICE + blob.source for blob in blobs)
        return storage

    async def _plug_volume(self, volume: DirectMount, drives: Drives) -> None:
        from shimv2 import direct_volumes

        drives.hold_volume(volume.source, self._id)
        direct_volumes.claim(volume.source, self._sandbox_id)
        record = volume.record
        drive = await drives.plug(record.device, self._id, readonly=record.readonly)
        point = direct_mount_point(volume.source)
        storage = _storage(drive, record.fstype, record.options, point)
        if record.group is not None:
            storage.fs_group.group_id = record.group
            storage.fs_group.group_change_policy = _POLICIES[record.policy]
        self.storages.append(storage)


def direct_mount_point(source: str) -> str:
    """Where the guest mounts a direct volume: the same for all containers of the pod."""
    import base64  # rarely needed

    return f"{STORAGE}/{base64.urlsafe_b64encode(source.encode()).decode()}"


def _storage(drive: Drive, fstype: str, options: list[str], point: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver=drive.driver,
        source=drive.source,
        fstype=fstype,
        options=options,
        mount_point=point,
    )
