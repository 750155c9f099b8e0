# SPDX-License-Identifier: Apache-2.0
"""Block devices of a container's spec: plugged, and given to it under the guest's numbers.

The spec names a device by the host's numbers.  The agent, which learns the guest's, exchanges
them in the nodes, in the rules of the devices cgroup and in the limits of block I/O.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from agent.api import agent_pb2, oci_pb2
from shimv2.drives import DriveError, Drives, host_node
from shimv2.spec import Mount

log = logging.getLogger("container")

_NODE_MODE = 0o660
_THROTTLES = (
    "ThrottleReadBpsDevice",
    "ThrottleWriteBpsDevice",
    "ThrottleReadIOPSDevice",
    "ThrottleWriteIOPSDevice",
)

Numbers = tuple[int, int]


async def plug(
    oci: oci_pb2.Spec,
    rules: Sequence[oci_pb2.LinuxDeviceCgroup],
    limits: oci_pb2.LinuxBlockIO,
    mounts: Sequence[Mount],
    drives: Drives,
    container_id: str,
) -> list[agent_pb2.Device]:
    """Plug what ``linux.devices`` and `mounts` name.

    Args:
        oci: for the guest; its devices, rules and limits are completed.
        rules: of the host's spec (`shimv2.guest_spec.device_rules`).
        limits: of the host's spec.
        mounts: bind mounts whose source is a block device.

    Returns:
        For CreateContainer.

    Raises:
        DriveError, VmmError: names the device.
    """
    listed = oci.Linux.Devices
    for mount in mounts:
        number = os.stat(mount.source).st_rdev
        listed.add(
            Path=mount.destination,
            Type="b",
            Major=os.major(number),
            Minor=os.minor(number),
            FileMode=_NODE_MODE,
        )
    readonly = {mount.destination for mount in mounts if mount.readonly}
    plugged: dict[Numbers, agent_pb2.Device] = {}
    devices: list[agent_pb2.Device] = []
    if _allows_all(rules) and _has_all(listed):
        _leave_out(listed)
    for entry in [entry for entry in listed if entry.Type == "b"]:
        numbers = entry.Major, entry.Minor
        try:
            drive = await drives.plug(
                host_node(*numbers),
                container_id,
                readonly=entry.Path in readonly or not _is_written(rules, numbers),
            )
        except DriveError as error:
            raise DriveError(f"device {entry.Path}: {error}") from error
        device = agent_pb2.Device(id=drive.source, type=drive.driver, container_path=entry.Path)
        plugged.setdefault(numbers, device)
        devices.append(device)
    if plugged or rules:  # also against disks that are others'
        oci.Linux.Resources.Devices.extend(_rules(rules, mounts, plugged))
    if plugged:
        _limit(oci.Linux.Resources.BlockIO, limits, plugged)
    return devices


def _has_all(listed: Iterable[oci_pb2.LinuxDevice]) -> bool:
    """Whether every block device of this host is listed, as engines do it for privileged
    containers: nobody has asked for one of them."""
    numbers = {(entry.Major, entry.Minor) for entry in listed if entry.Type == "b"}
    return numbers >= host_numbers()


def host_numbers() -> set[Numbers]:
    """Of the host's block devices that have a node."""
    found = set()
    for name in os.listdir("/sys/class/block"):
        with contextlib.suppress(OSError):
            number = os.stat(f"/dev/{name.replace('!', '/')}").st_rdev
            found.add((os.major(number), os.minor(number)))
    return found


def _leave_out(listed: Any) -> None:
    """Those under the host's own names; one that was asked for may have another."""
    names = []
    for entry in [entry for entry in listed if entry.Type == "b"]:
        with contextlib.suppress(DriveError):
            if str(host_node(entry.Major, entry.Minor)) != entry.Path:
                continue
        names.append(entry.Path)
        listed.remove(entry)
    log.info("a privileged container lists all devices of the host: without %s", ", ".join(names))


def _rules(
    rules: Iterable[oci_pb2.LinuxDeviceCgroup],
    mounts: Iterable[Mount],
    plugged: dict[Numbers, agent_pb2.Device],
) -> list[oci_pb2.LinuxDeviceCgroup]:
    """Those of the spec, without those for block devices that only the host has; the devices of
    mounts have none in the spec."""
    kept = [
        rule
        for rule in rules
        if rule.Type != "b" or rule.Major < 0 or (rule.Major, rule.Minor) in plugged
    ]
    if not kept:
        kept = [oci_pb2.LinuxDeviceCgroup(Allow=False, Major=-1, Minor=-1, Access="rwm")]
    for mount in mounts:
        number = os.stat(mount.source).st_rdev
        kept.append(
            oci_pb2.LinuxDeviceCgroup(
                Allow=True,
                Type="b",
                Major=os.major(number),
                Minor=os.minor(number),
                Access="r" if mount.readonly else "rw",
            )
        )
    return kept


def _limit(
    kept: oci_pb2.LinuxBlockIO,
    wanted: oci_pb2.LinuxBlockIO,
    plugged: dict[Numbers, agent_pb2.Device],
) -> None:
    for name in _THROTTLES:
        for limit in getattr(wanted, name):
            if (limit.Major, limit.Minor) in plugged:
                getattr(kept, name).add().CopyFrom(limit)


def _is_written(rules: Iterable[oci_pb2.LinuxDeviceCgroup], numbers: Numbers) -> bool:
    """Whether the rules let it be written; the last that speaks of it counts."""
    said = True
    for rule in rules:
        if rule.Type == "b" and (rule.Major, rule.Minor) == numbers:
            said = rule.Allow and "w" in rule.Access
    return said


def _allows_all(rules: Iterable[oci_pb2.LinuxDeviceCgroup]) -> bool:
    said = False
    for rule in rules:
        if rule.Type in ("", "a") and rule.Major < 0 and "w" in rule.Access:
            said = rule.Allow
    return said
