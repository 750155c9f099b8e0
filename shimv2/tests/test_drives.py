# SPDX-License-Identifier: Apache-2.0
"""Disks of a VM: plugged once, unplugged with the last who has them, nothing left of failures."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.api import oci_pb2
from shimv2 import block_devices, drives, loop, mounts
from shimv2.config import HypervisorConfig
from shimv2.drives import DriveError, Drives, disk_limits, host_node
from shimv2.guest_spec import device_rules
from shimv2.spec import Mount, Spec
from vmm.errors import CapacityError, VmmError
from vmm.hypervisor import BlockDevice, DeviceAddress


class Vm:
    """A VM with three places for disks.

    Attributes:
        disks: what is plugged, by id.
        stuck: ids that the guest does not let go.
    """

    def __init__(self) -> None:
        self.disks: dict[str, BlockDevice] = {}
        self.stuck: set[str] = set()

    async def add_device(self, device: BlockDevice) -> DeviceAddress:
        if len(self.disks) == 3:
            raise CapacityError("no PCI slot left")
        self.disks[device.id] = device
        return DeviceAddress(pci_path=f"02/{len(self.disks):02x}")

    async def remove_device(self, device_id: str) -> None:
        if device_id in self.stuck:
            raise VmmError("the guest did not release it")
        del self.disks[device_id]


def drives_of(vm: Vm, **config: Any) -> Drives:
    return Drives(HypervisorConfig(**config), vm)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.touch()
    return paths


async def test_one_disk_for_all_that_have_it(files: list[Path], tmp_path: Path) -> None:
    vm = Vm()
    drives = drives_of(vm)
    link = tmp_path / "link"
    link.symlink_to(files[0])
    first = await drives.plug(files[0], "a", readonly=True)
    assert await drives.plug(link, "b", readonly=True) is first
    assert not drives.written
    await drives.plug(files[1], "b", readonly=False)
    assert drives.written
    await drives.release("a")
    assert len(vm.disks) == 2
    await drives.release("b")
    await drives.release("b")
    assert vm.disks == {}
    assert not drives.written


async def test_a_reader_has_the_disk_of_a_writer(files: list[Path]) -> None:
    drives = drives_of(Vm())
    written = await drives.plug(files[0], "a", readonly=False)
    assert await drives.plug(files[0], "b", readonly=True) is written


async def test_no_place_is_told_and_leaves_nothing(files: list[Path]) -> None:
    vm = Vm()
    drives = drives_of(vm)
    for path in files[:3]:
        await drives.plug(path, "a", readonly=True)
    with pytest.raises(CapacityError, match=f"{files[3]}.*virtio-scsi"):
        await drives.plug(files[3], "b", readonly=True)
    await drives.release("b")
    await drives.release("a")
    assert vm.disks == {}
    await drives.plug(files[3], "b", readonly=True)


async def test_what_the_guest_keeps_is_there_for_the_next(files: list[Path]) -> None:
    vm = Vm()
    drives = drives_of(vm)
    drive = await drives.plug(files[0], "a", readonly=False)
    vm.stuck.add(drive.id)
    await drives.release("a")
    assert await drives.plug(files[0], "b", readonly=False) is drive
    vm.stuck.clear()
    await drives.release("b")
    assert vm.disks == {}


async def test_what_is_no_disk(tmp_path: Path) -> None:
    drives = drives_of(Vm())
    for path in (tmp_path, tmp_path / "nosuch", Path("/dev/null")):
        with pytest.raises(DriveError, match=str(path)):
            await drives.plug(path, "a", readonly=True)
    with pytest.raises(DriveError, match="4095:1"):
        host_node(4095, 1)


def test_a_disk_that_the_host_has_mounted_is_not_written_to(tmp_path: Path, isolated) -> None:
    image, point = tmp_path / "image", tmp_path / "point"
    image.touch()
    os.truncate(image, 4 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    point.mkdir()

    async def plug(device: str, *, readonly: bool) -> None:
        await drives_of(Vm()).plug(Path(device), "a", readonly=readonly)

    def body() -> None:
        with loop.attached(str(image), readonly=False) as device:
            trio.run(partial(plug, device, readonly=False))
            mounts.mount(device, point, "ext4")
            with pytest.raises(DriveError, match=f"{device} is in use"):
                trio.run(partial(plug, device, readonly=False))
            trio.run(partial(plug, device, readonly=True))
            mounts.umount(point)

    isolated(body)


async def test_what_the_configuration_says_of_disks(files: list[Path]) -> None:
    vm = Vm()
    drives = drives_of(
        vm,
        block_device_driver="virtio-scsi",
        block_device_aio="native",
        block_device_cache_direct=True,  # without block_device_cache_set
        disk_rate_limiter_bw_max_rate=80_000_000,
        disk_rate_limiter_ops_max_rate=100,
        disk_rate_limiter_ops_one_time_burst=500,
    )
    await drives.plug(files[0], "a", readonly=True)
    (device,) = vm.disks.values()
    assert (device.driver, device.aio, device.cache_direct) == ("virtio-scsi", "native", False)
    assert device.limits is not None
    assert device.limits.bytes_per_second == 10_000_000
    assert device.limits.operations_burst == 500
    assert disk_limits(HypervisorConfig()) is None


async def test_without_io_uring_threads_are_used(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for there, used in ((True, "io_uring"), (False, "threads")):
        monkeypatch.setattr(drives, "has_io_uring", lambda: there)  # noqa: B023
        vm = Vm()
        await drives_of(vm, block_device_aio="io_uring").plug(files[0], "a", readonly=True)
        assert [disk.aio for disk in vm.disks.values()] == [used]


def rules(*listed: dict[str, Any]) -> list[oci_pb2.LinuxDeviceCgroup]:
    return device_rules(Spec({"linux": {"resources": {"devices": list(listed)}}}, Path("/b")))


NO_LIMITS = oci_pb2.LinuxBlockIO()
DENY_ALL = {"allow": False, "access": "rwm"}


@pytest.fixture
def disk(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for every block device of the host but 7:99."""

    def node(major: int, minor: int) -> Path:
        if (major, minor) == (7, 99):
            raise DriveError("block device 7:99 does not exist on this host")
        return files[0]

    monkeypatch.setattr(block_devices, "host_node", node)
    return files[0]


async def test_devices_of_a_spec(disk: Path) -> None:
    vm = Vm()
    oci = oci_pb2.Spec()
    oci.Linux.Devices.add(Path="/dev/xvda", Type="b", Major=7, Minor=3)
    oci.Linux.Devices.add(Path="/dev/fuse", Type="c", Major=10, Minor=229)
    limits = [oci_pb2.LinuxThrottleDevice(Major=7, Minor=m, Rate=1000) for m in (3, 4)]
    block_io = oci_pb2.LinuxBlockIO(ThrottleReadBpsDevice=limits)
    wanted = rules(
        DENY_ALL,
        {"allow": True, "type": "c", "major": 136, "access": "rwm"},
        {"allow": True, "type": "c", "major": 5, "minor": 0, "access": "rwm"},
        {"allow": True, "type": "b", "major": 7, "minor": 3, "access": "rm"},
        {"allow": True, "type": "b", "major": 7, "minor": 4, "access": "rwm"},
    )
    (device,) = await block_devices.plug(oci, wanted, block_io, [], drives_of(vm), "a")
    assert (device.type, device.id, device.container_path) == ("blk", "02/01", "/dev/xvda")
    assert [d.readonly for d in vm.disks.values()] == [True], "as the rule says"
    assert [(r.Type, r.Major, r.Minor) for r in oci.Linux.Resources.Devices] == [
        ("", -1, -1),
        ("c", 136, -1),
        ("c", 5, 0),
        ("b", 7, 3),
    ]
    assert [t.Minor for t in oci.Linux.Resources.BlockIO.ThrottleReadBpsDevice] == [3]


async def test_a_missing_device_is_named(disk: Path) -> None:
    oci = oci_pb2.Spec()
    oci.Linux.Devices.add(Path="/dev/gone", Type="b", Major=7, Minor=99)
    with pytest.raises(DriveError, match=r"/dev/gone.*7:99"):
        await block_devices.plug(oci, rules(), NO_LIMITS, [], drives_of(Vm()), "a")


async def test_a_privileged_container_has_none_of_all_that_the_host_has(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_devices, "host_numbers", lambda: {(7, 1), (7, 99)})
    everything = rules(DENY_ALL | {"allow": True})
    for listed, wanted in (
        ([(str(disk), 1), ("/dev/gone", 99), ("/dev/asked-for", 1)], ["/dev/asked-for"]),
        ([(str(disk), 1)], [str(disk)]),  # with privileged_without_host_devices
    ):
        oci = oci_pb2.Spec()
        for path, minor in listed:
            oci.Linux.Devices.add(Path=path, Type="b", Major=7, Minor=minor)
        made = await block_devices.plug(oci, everything, NO_LIMITS, [], drives_of(Vm()), "a")
        assert [device.container_path for device in made] == wanted
        assert [entry.Path for entry in oci.Linux.Devices] == wanted


async def test_a_mounted_device_becomes_one_of_the_spec(disk: Path) -> None:
    vm = Vm()
    oci = oci_pb2.Spec()
    mount = Mount("/dev/xvda", "bind", "/dev/null", ["ro"])  # whose numbers are looked at only
    (device,) = await block_devices.plug(oci, [], NO_LIMITS, [mount], drives_of(vm), "a")
    assert device.container_path == "/dev/xvda"
    assert [(entry.Path, entry.Type) for entry in oci.Linux.Devices] == [("/dev/xvda", "b")]
    assert [d.readonly for d in vm.disks.values()] == [True]
    deny, allow = oci.Linux.Resources.Devices
    assert (deny.Allow, allow.Allow, allow.Access) == (False, True, "r")


async def test_rules_are_kept_without_devices() -> None:
    """A disk of another container has numbers that a privileged process could make a node of."""
    oci = oci_pb2.Spec()
    block = {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "rw"}
    wanted = rules(DENY_ALL, block)
    assert await block_devices.plug(oci, wanted, NO_LIMITS, [], drives_of(Vm()), "a") == []
    (rule,) = oci.Linux.Resources.Devices
    assert (rule.Allow, rule.Major) == (False, -1)


def test_a_volume_has_a_user_until_the_last_container_drops_it() -> None:
    drives = drives_of(Vm())
    for holder in ("a", "b"):
        drives.hold_volume("/v", holder)
    assert not drives.drop_volume("/v", "a")
    assert not drives.drop_volume("/v", "a")
    assert drives.drop_volume("/v", "b")
    assert drives.drop_volume("/v", "b")
