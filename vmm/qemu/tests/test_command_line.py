# SPDX-License-Identifier: Apache-2.0
"""Command line, devices, slots, memory and tables, without a QEMU."""

from __future__ import annotations

import itertools
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from vmm.errors import CapacityError, UnsupportedError, VmmConfigError
from vmm.hypervisor import (
    Accelerator,
    BlockDevice,
    DiskLimits,
    FsDevice,
    NetDevice,
    VmConfig,
    VsockDevice,
)
from vmm.qemu import command_line, devices, kernel, memory, pci
from vmm.qemu.scsi import ScsiBus

CONFIG = VmConfig(
    id="a,b",
    state_dir=Path("/run/vm"),
    binary=Path("/usr/bin/qemu-system-x86_64"),
    kernel=Path("/k"),
    image=Path("/i"),
    max_vcpus=4,
    max_memory_mib=8192,
    kernel_params="agent.log=debug",
)


def options(argv: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(argv) if option == name]


def build(config: VmConfig = CONFIG, **changes: object) -> list[str]:
    boot = command_line.Boot(
        config=config, accelerator=Accelerator.TCG, devices=[], root_ports=2, qmp_fd=9
    )
    return command_line.build(replace(boot, **changes))  # type: ignore[arg-type]


def test_what_is_always_there() -> None:
    argv = build()
    assert argv[0] == "/usr/bin/qemu-system-x86_64"
    assert {"-nodefaults", "-no-user-config", "-no-reboot", "-nographic"} <= {*argv}
    assert options(argv, "-sandbox") == [command_line.SANDBOX]
    assert options(argv, "-name") == ["sandbox-a,,b,debug-threads=on"]
    assert options(argv, "-m") == ["2048M,slots=10,maxmem=9216M"]
    assert options(argv, "-smp") == ["4,sockets=4,cores=1,threads=1,maxcpus=4"]
    # Three vCPUs that may never run hold a region of the buffer each.
    assert options(argv, "-accel") == ["tcg,thread=multi,tb-size=102"]
    backend = json.loads(options(argv, "-object")[0])
    assert backend["qom-type"] == "memory-backend-memfd"
    assert backend["share"] is True
    append = options(argv, "-append")[0]
    assert "root=/dev/vda1 ro rootfstype=erofs" in append
    assert append.startswith("maxcpus=1 "), "TCG has all vCPUs from the start"
    assert append.endswith("agent.log=debug")
    ports = [
        d for d in map(json.loads, options(argv, "-device")) if d["driver"] == "pcie-root-port"
    ]
    assert [port["addr"] for port in ports] == ["0x4", "0x5"]


def test_variants() -> None:
    kvm = build(accelerator=Accelerator.KVM)
    assert options(kvm, "-accel") == ["kvm"]
    assert options(kvm, "-cpu") == ["host"]
    assert options(kvm, "-smp") == ["1,sockets=4,cores=1,threads=1,maxcpus=4"]
    assert "maxcpus" not in options(kvm, "-append")[0]
    config = replace(CONFIG, cpu_features="pmu=off", seccomp="off", max_memory_mib=2048)
    assert options(build(config), "-cpu") == ["max,-erms,-fsrm,pmu=off"]
    assert options(build(config), "-sandbox") == ["off"]
    assert options(build(config), "-m") == ["2048M"]
    elastic = replace(CONFIG, virtio_mem=True, memory_slots=0)
    assert options(build(elastic), "-m") == ["2048M,maxmem=9216M"]
    assert "-S" in build(incoming=True)
    huge = json.loads(options(build(replace(CONFIG, hugepages=True)), "-object")[0])
    assert huge["hugetlb"] is True
    assert huge["prealloc"] is True
    private = json.loads(options(build(replace(CONFIG, shared_memory=False)), "-object")[0])
    assert private["qom-type"] == "memory-backend-ram"


def test_slots() -> None:
    layout = pci.PciLayout()
    layout.root_ports = 1
    assert layout.take_port("fs").path == "04/00"
    assert layout.take_port("vsock").path == "02/01"  # no port is left
    layout.release("vsock")
    layout.release("fs")
    assert layout.take_port("vsock").path == "04/00"
    paths = [layout.take_bridge_slot(f"d{n}").path for n in range(30)]
    assert paths[0] == "02/01"
    assert paths[-1] == "02/1e"
    assert len({*paths}) == 30
    with pytest.raises(CapacityError):
        layout.take_bridge_slot("d30")
    layout.release("d3")
    assert layout.take_bridge_slot("d30").path == "02/04"
    assert layout.take_boot_slot("b").path == "08"


def test_boot_slots_go_on_on_the_bridge() -> None:
    layout = pci.PciLayout()
    paths = [layout.take_boot_slot(f"d{n}").path for n in range(23)]
    assert paths[-2:] == ["1d", "02/01"]


def test_ids() -> None:
    assert devices.qemu_id("drive", "a.b-c_1") == "drive-a.b-c_1"
    long = "f" * 63
    first, second = (devices.qemu_id("drive", long + end) for end in "ab")
    assert first != second
    assert len(first) == devices.MAX_ID
    assert devices.qemu_id("drive", "a/b") == devices.qemu_id("drive", "a/b")
    assert "/" not in devices.qemu_id("drive", "a/b")


def test_net_and_fs(tmp_path: Path) -> None:
    place = pci.bridge_slot(3)
    one = devices.virtio_net(NetDevice("n", "02:00:00:00:00:01", (5,)), place)
    assert one.netdevs[0].option() == "tap,id=network-n,fd=5"
    many = devices.virtio_net(NetDevice("n", "02:00:00:00:00:01", (5, 6), (7, 8)), place)
    assert many.netdevs[0].option() == "tap,id=network-n,fds=5:6,vhost=on,vhostfds=7:8"
    assert many.device["vectors"] == 6
    share = devices.virtio_fs(FsDevice("f", "kataShared", Path("/a,b")), place)
    assert share.chardevs[0].option() == "socket,id=char-f,path=/a,,b"
    assert share.device["queue-size"] == 1024
    with pytest.raises(UnsupportedError):
        devices.virtio_vsock(VsockDevice("v", 3), place, str)
    kernel_vsock = devices.virtio_vsock(VsockDevice("v", 3, vhost_fd=9), place, str)
    assert kernel_vsock.device["vhostfd"] == "9"


def test_disks(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    node = devices.blockdev("n", BlockDevice("d", path, aio="native", discard=True))
    assert node["file"]["driver"] == "file"
    assert node["file"]["cache"]["direct"] is True
    assert node["discard"] == "unmap"
    for wrong in (tmp_path, tmp_path / "nosuch", Path("/dev/null")):
        with pytest.raises(VmmConfigError, match=str(wrong)):
            devices.blockdev("n", BlockDevice("d", wrong))


@pytest.mark.parametrize(
    ("current", "wanted", "more"),
    [(2048, 2048, 0), (2048, 1, 0), (2048, 2049, 128), (2048, 2176, 128), (2048, 2177, 256)],
)
def test_memory_grows_by_blocks(current: int, wanted: int, more: int) -> None:
    assert memory.growth(current, wanted) == more


def test_sparse_copy_keeps_holes(tmp_path: Path) -> None:
    source = os.memfd_create("source")
    os.ftruncate(source, 64 << 20)
    os.pwrite(source, b"middle", 32 << 20)
    with (tmp_path / "copy").open("w+b") as copy:
        memory.copy_sparse(source, copy.fileno())
        copy.seek(32 << 20)
        assert copy.read(6) == b"middle"
        status = os.fstat(copy.fileno())
        assert status.st_size == 64 << 20
        assert status.st_blocks * 512 < 1 << 20
    os.close(source)


def elf_with_note(name: bytes, kind: int) -> bytes:
    note = struct.pack("<III", len(name), 8, kind) + name.ljust(4, b"\0") + bytes(8)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return (header + segment + note).ljust(1024, b"\0")


def test_kernel_formats(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf_with_note(b"Xen\0", 18))
    assert kernel.detect_format(path) is kernel.KernelFormat.PVH
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    assert kernel.detect_format(path) is kernel.KernelFormat.BZIMAGE
    for content in (
        elf_with_note(b"GNU\0", 18),
        b"\x7fELF\x02\x01" + b"\xff" * 600,
        b"",
        b"#!/bin/sh",
    ):
        path.write_bytes(content)
        with pytest.raises(VmmConfigError, match="kernel"):
            kernel.detect_format(path)


def test_limits_of_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    limits = DiskLimits(bytes_per_second=1000, bytes_burst=500, operations_per_second=10)
    place = pci.bridge_slot(1)
    parts = devices.virtio_blk(BlockDevice("d", path, limits=limits, queues=2), place)
    (group,) = parts.objects
    raw, throttle = parts.blockdevs
    assert group["limits"] == {"bps-total": 1000, "iops-total": 10}, "no bucket below its rate"
    assert (throttle["file"], throttle["throttle-group"]) == (raw["node-name"], group["id"])
    assert parts.device["drive"] == throttle["node-name"]
    assert parts.device["num-queues"] == 2
    assert devices.throttle_limits(DiskLimits(operations_per_second=10, operations_burst=50)) == {
        "iops-total": 10,
        "iops-total-max": 50,
    }


def test_scsi_addresses() -> None:
    bus = ScsiBus()
    places = [bus.take(f"d{number}") for number in range(258)]
    assert (places[0], places[255], places[256]) == ((0, 0), (0, 255), (1, 0))
    bus.release("d1")
    assert bus.take("again") == (0, 1)
