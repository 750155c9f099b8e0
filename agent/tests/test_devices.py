# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agent import devices, uevents, waiting
from agent.api import agent_pb2, oci_pb2
from ttrpc.errors import Code, RpcError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes")


@pytest.fixture
def guest(tmp_path: Path) -> tuple[str, str]:
    """sysfs and /dev of a guest with two virtio disks, one behind a bridge, and a SCSI disk."""
    sysfs, dev = tmp_path / "sys", tmp_path / "dev"
    root = sysfs / "devices/pci0000:00"
    (root / "0000:00:03.0/virtio1/block/vda").mkdir(parents=True)
    (root / "0000:00:02.0/pci_bus/0000:01").mkdir(parents=True)
    (root / "0000:00:02.0/0000:01:0a.0/virtio2/block/vdb").mkdir(parents=True)
    (root / "0000:00:04.0/virtio3/net/ens4").mkdir(parents=True)
    (root / "0000:00:05.1/virtio5/block/vdc").mkdir(parents=True)
    (sysfs / "bus/scsi/devices/0:0:0:3/block/sda").mkdir(parents=True)
    (sysfs / "bus/scsi/devices/host0").mkdir()
    (sysfs / "class/scsi_host/host0").mkdir(parents=True)
    (sysfs / "class/scsi_host/host0/scan").touch()
    dev.mkdir()
    for name, number in (
        ("vda", (254, 0)),
        ("vdb", (254, 16)),
        ("sda", (8, 0)),
        ("pmem0", (259, 1)),
    ):
        os.mknod(dev / name, stat.S_IFBLK | 0o600, os.makedev(*number))
    return str(sysfs), str(dev)


def _spec(*entries: tuple[str, str, int, int]) -> oci_pb2.Spec:
    spec = oci_pb2.Spec()
    for path, kind, major, minor in entries:
        spec.Linux.Devices.add(Path=path, Type=kind, Major=major, Minor=minor)
        spec.Linux.Resources.Devices.add(
            Allow=True, Type=kind, Major=major, Minor=minor, Access="rw"
        )
    return spec


def _attach(guest: tuple[str, str], spec: oci_pb2.Spec, *entries: dict[str, Any]) -> None:
    requests = [agent_pb2.Device(**entry) for entry in entries]
    waiting.run(devices.attach_devices(requests, spec, 0.05, *guest))


def _numbers(spec: oci_pb2.Spec) -> list[tuple[str, str, int, int]]:
    return [(d.Path, d.Type, d.Major, d.Minor) for d in spec.Linux.Devices]


def test_pci_paths(guest: tuple[str, str]) -> None:
    sysfs = guest[0]
    assert uevents.pci_block_name("03", sysfs) == "vda"
    assert uevents.pci_block_name("02/0a", sysfs) == "vdb"
    assert uevents.pci_block_name("05.1", sysfs) == "vdc"
    assert uevents.pci_net_name("04", sysfs) == "ens4"
    assert uevents.pci_block_name("04", sysfs) is None
    assert uevents.pci_block_name("07", sysfs) is None
    assert uevents.pci_block_name("02/0b", sysfs) is None
    assert uevents.pci_block_name("03/01", sysfs) is None


def test_pci_path_of_another_root_complex(tmp_path: Path) -> None:
    root = tmp_path / "devices/pci0000:20"
    (root / "0000:20:01.0/pci_bus/0000:21").mkdir(parents=True)
    (root / "0000:20:01.0/0000:21:00.0/virtio0/block/vdz").mkdir(parents=True)
    assert uevents.pci_block_name("20/01/00", str(tmp_path)) == "vdz"


def test_arm_host_bridge(tmp_path: Path) -> None:
    root = tmp_path / "devices/platform/4010000000.pcie/pci0000:00"
    (root / "0000:00:01.0/virtio0/block/vda").mkdir(parents=True)
    assert uevents.pci_block_name("01", str(tmp_path)) == "vda"


@pytest.mark.parametrize("path", ["", "3", "zz", "03/", "03.8", "20", "02/20", "003"])
def test_malformed_pci_paths(path: str) -> None:
    with pytest.raises(RpcError) as caught:
        uevents.parse_pci_path(path)
    assert caught.value.code == Code.INVALID_ARGUMENT


def test_numbers_of_the_guest_replace_the_hosts(guest: tuple[str, str]) -> None:
    # the host's number of one is the guest's of the other: no mix-up
    spec = _spec(("/dev/x", "b", 254, 16), ("/dev/y", "b", 254, 0), ("/dev/null", "c", 1, 3))
    limits = spec.Linux.Resources.BlockIO.ThrottleReadBpsDevice
    limits.add(Major=254, Minor=16, Rate=1000)
    _attach(
        guest,
        spec,
        {"type": "blk", "id": "03", "container_path": "/dev/x"},
        {"type": "blk", "id": "02/0a", "container_path": "/dev/y"},
    )
    assert [(limit.Major, limit.Minor) for limit in limits] == [(254, 0)]
    assert _numbers(spec) == [
        ("/dev/x", "b", 254, 0),
        ("/dev/y", "b", 254, 16),
        ("/dev/null", "c", 1, 3),
    ]
    rules = [(r.Type, r.Major, r.Minor) for r in spec.Linux.Resources.Devices]
    assert rules == [("b", 254, 0), ("b", 254, 16), ("c", 1, 3)]


def test_scsi_and_plain_nodes(guest: tuple[str, str]) -> None:
    spec = _spec(("/dev/s", "b", 7, 1), ("/dev/p", "b", 7, 2), ("/dev/m", "b", 7, 3))
    _attach(
        guest,
        spec,
        {"type": "scsi", "id": "0:3", "container_path": "/dev/s"},
        {"type": "nvdimm", "vm_path": "/dev/pmem0", "container_path": "/dev/p"},
        {"type": "mmioblk", "vm_path": "/dev/vda", "container_path": "/dev/m"},
    )
    assert [numbers[2:] for numbers in _numbers(spec)] == [(8, 0), (259, 1), (254, 0)]
    assert Path(guest[0], "class/scsi_host/host0/scan").read_text() == "0 0 3"


def test_a_scsi_host_is_asked_once_it_is_ready(tmp_path: Path) -> None:
    sysfs, dev = tmp_path / "sys", tmp_path / "dev"
    (sysfs / "class/scsi_host").mkdir(parents=True)
    work = uevents.wait_block_device("scsi", "0:1", 5.0, str(sysfs), str(dev))
    step = next(work)
    assert isinstance(step, waiting.Wait)
    virtio = sysfs / "devices/pci0000:00/virtio5"
    host = virtio / "host0/scsi_host/host0"
    host.mkdir(parents=True)
    (host / "scan").touch()
    (virtio / "status").write_text("0x00000003\n")  # its driver is still at work
    (sysfs / "class/scsi_host/host0").symlink_to(host)
    assert not step.ready()
    assert (host / "scan").read_text() == ""
    (virtio / "status").write_text("0x0000000f\n")
    assert not step.ready()
    assert (host / "scan").read_text() == "0 0 1"
    (host / "scan").write_text("")
    (sysfs / "bus/scsi/devices/0:0:0:1/block/sda").mkdir(parents=True)
    dev.mkdir()
    (dev / "sda").touch()
    assert step.ready()
    assert (host / "scan").read_text() == "", "once is enough"


@pytest.mark.parametrize(
    ("entry", "code", "text"),
    [
        (
            {"type": "blk", "id": "03", "container_path": "/dev/other"},
            Code.INVALID_ARGUMENT,
            "/dev/other",
        ),
        ({"type": "blk", "id": "09", "container_path": "/dev/x"}, Code.DEADLINE_EXCEEDED, "09"),
        ({"type": "blk", "container_path": "/dev/x"}, Code.INVALID_ARGUMENT, "id is empty"),
        ({"type": "mmioblk", "container_path": "/dev/x"}, Code.INVALID_ARGUMENT, "vm_path"),
        ({"type": "blk", "id": "03"}, Code.INVALID_ARGUMENT, "container_path"),
        ({"type": "vfio-pci", "id": "1", "container_path": "/dev/x"}, Code.UNIMPLEMENTED, "vfio"),
        (
            {"type": "toaster", "id": "1", "container_path": "/dev/x"},
            Code.INVALID_ARGUMENT,
            "toaster",
        ),
    ],
)
def test_bad_devices(guest: tuple[str, str], entry: dict[str, Any], code: Code, text: str) -> None:
    spec = _spec(("/dev/x", "b", 7, 1))
    with pytest.raises(RpcError) as caught:
        _attach(guest, spec, entry)
    assert caught.value.code == code
    assert text in caught.value.message
    assert _numbers(spec) == [("/dev/x", "b", 7, 1)]


def test_uevents_are_read() -> None:
    events = uevents.Uevents()
    try:
        assert events.drain() == 0
        trigger = Path("/sys/class/mem/null/uevent")
        if not trigger.exists():
            pytest.skip("no device to ask for an event")
        trigger.write_text("change")
        assert events.drain() >= 1
    finally:
        events.close()
