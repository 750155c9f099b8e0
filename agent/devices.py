# SPDX-License-Identifier: Apache-2.0
"""Device objects of CreateContainer: find the guest's node and put its numbers into the spec."""

from __future__ import annotations

import os
import stat

from agent import uevents
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.api import agent_pb2, oci_pb2
    from agent.waiting import Work

DRIVERS = ("blk", "mmioblk", "scsi", "nvdimm")
_THROTTLES = (
    "ThrottleReadBpsDevice",
    "ThrottleWriteBpsDevice",
    "ThrottleReadIOPSDevice",
    "ThrottleWriteIOPSDevice",
)
_ELSEWHERE = ("blk-ccw", "vfio-pci-gk", "vfio-pci", "vfio-ap", "vfio-ap-cold")


def attach_devices(
    devices: Iterable[agent_pb2.Device],
    spec: oci_pb2.Spec,
    timeout: float = 3.0,
    sysfs: str = "/sys",
    dev: str = "/dev",
) -> Work[None]:
    """Wait for every device, then rewrite linux.devices of `spec` and what names them.

    All are resolved before the first change, so that numbers of the host and the guest that
    happen to be equal are not taken for one another. Raises INVALID_ARGUMENT (unknown type,
    missing field, a device that the spec doesn't list), UNIMPLEMENTED, DEADLINE_EXCEEDED.
    """
    found: list[tuple[str, str, int]] = []
    for device in devices:
        node = yield from _node(device, timeout, sysfs, dev)
        status = os.stat(node)
        if not (stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)):
            raise RpcError(Code.INTERNAL, f"device {device.container_path}: {node} is no device")
        kind = "b" if stat.S_ISBLK(status.st_mode) else "c"
        found.append((device.container_path, kind, status.st_rdev))
    changes: dict[tuple[str, int, int], tuple[str, int, int]] = {}
    for path, kind, number in found:
        entries = [entry for entry in spec.Linux.Devices if entry.Path == path]
        if not entries:
            raise RpcError(Code.INVALID_ARGUMENT, f"device {path!r} is not in the spec's devices")
        fresh = (kind, os.major(number), os.minor(number))
        for entry in entries:
            old = (entry.Type, entry.Major, entry.Minor)
            if changes.get(old, fresh) != fresh:
                raise RpcError(
                    Code.INVALID_ARGUMENT,
                    f"device {path!r}: {old} of the spec means two devices of the guest",
                )
            changes[old] = fresh
            entry.Type, entry.Major, entry.Minor = fresh
    limits = spec.Linux.Resources.BlockIO
    for name in _THROTTLES:
        for limit in getattr(limits, name):
            change = changes.get(("b", limit.Major, limit.Minor))
            if change is not None:
                _, limit.Major, limit.Minor = change
    for rule in spec.Linux.Resources.Devices:
        kinds = "bc" if rule.Type in ("", "a") else rule.Type
        for kind in kinds:
            change = changes.get((kind, rule.Major, rule.Minor))
            if change is not None:
                rule.Type, rule.Major, rule.Minor = change
                break


def _node(device: agent_pb2.Device, timeout: float, sysfs: str, dev: str) -> Work[str]:
    kind = device.type
    if not device.container_path:
        raise RpcError(Code.INVALID_ARGUMENT, f"device {device.id!r}: container_path is empty")
    if kind in _ELSEWHERE:
        raise RpcError(
            Code.UNIMPLEMENTED, f"device {device.container_path}: type {kind!r} is not supported"
        )
    if kind not in DRIVERS:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"device {device.container_path}: unknown type {kind!r}"
        )
    identifier = device.id if kind in ("blk", "scsi") else device.vm_path
    if kind == "blk" and not identifier:
        identifier = device.vm_path
    if not identifier:
        field = "id" if kind in ("blk", "scsi") else "vm_path"
        raise RpcError(
            Code.INVALID_ARGUMENT, f"{kind} device {device.container_path}: {field} is empty"
        )
    return (yield from uevents.wait_block_device(kind, identifier, timeout, sysfs, dev))
