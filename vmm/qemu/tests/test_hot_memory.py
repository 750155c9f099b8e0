# SPDX-License-Identifier: Apache-2.0
"""Memory that comes and goes: what QEMU is told, and in real VMs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vmm.errors import CapacityError, VmmError
from vmm.hypervisor import BalloonDevice, VmConfig
from vmm.qemu import Qemu, hot_memory, memory, pci
from vmm.qemu.hot_memory import HotMemory
from vmm.qemu.qmp import Event

_TOTAL = "busybox awk '/MemTotal/{print $2}' /proc/meminfo"


async def _until(condition: Any, what: str) -> None:
    with trio.fail_after(20):
        while not await condition():
            await trio.sleep(0.1)  # the guest's kernel tells nobody when it has done it
    assert await condition(), what


@pytest.mark.vm
async def test_virtio_mem_comes_and_goes(vm_config: VmConfig, boot: Any) -> None:
    config = replace(
        vm_config,
        virtio_mem=True,
        memory_slots=0,
        max_memory_mib=vm_config.memory_mib + 512,
        kernel_params=f"{vm_config.kernel_params} memory_hotplug.online_policy=auto-movable",
    )
    own = config.memory_mib
    async with boot(config) as (vm, shell):
        assert vm.capabilities.memory_unplug
        before = int((await shell.run(_TOTAL))[1])
        assert await vm.resize_memory(own) == own
        assert await vm.resize_memory(own + 130) == own + 132
        assert (await vm.metrics()).memory_mib == own + 132
        assert int((await shell.run(_TOTAL))[1]) - before >= 120 << 10
        with pytest.raises(CapacityError, match=f"ends at {own + 512} MiB"):
            await vm.resize_memory(own + 513)
        assert await vm.resize_memory(own + 512) == own + 512
        assert await vm.resize_memory(own + 4) == own + 4

        async def has_shrunk() -> bool:
            return (await vm.metrics()).memory_mib <= own + 128

        await _until(has_shrunk, "most of it is back")
        assert int((await shell.run(_TOTAL))[1]) - before < 128 << 10
        assert await vm.resize_memory(own + 256) == own + 256, "it comes again"


def _blocks(vm: Qemu) -> int:
    """MiB of the guest's memory file that are there."""
    file = memory.find_memory_file(vm.pid)
    assert file is not None
    return os.stat(file).st_blocks * 512 >> 20


def _mapped(vm: Qemu) -> int:
    """MiB of it that QEMU has mapped; its resident size would also count code translated meanwhile."""
    for line in Path(f"/proc/{vm.pid}/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("no RssShmem")


@pytest.mark.vm
async def test_freed_memory_goes_back_to_the_host(vm_config: VmConfig, boot: Any) -> None:
    config = replace(vm_config, memory_mib=256, max_memory_mib=256)
    async with boot(config, BalloonDevice("balloon0")) as (vm, shell):
        status, _ = await shell.run(
            "busybox mkdir -p /mnt/big; busybox mount -t tmpfs -o size=160m none /mnt/big &&"
            " busybox dd if=/dev/urandom of=/mnt/big/file bs=1M count=96 2>/dev/null"
        )
        assert status == 0
        resident, full = _mapped(vm), _blocks(vm)
        assert resident > 96
        await shell.run("busybox rm /mnt/big/file")

        async def is_back() -> bool:
            return _blocks(vm) <= full - 80

        await _until(is_back, "the file has holes again")
        assert _mapped(vm) <= resident - 80


# --- what QEMU is told ------------------------------------------------------------------


class FakeQmp:
    """A QEMU whose guest takes at most `takes` MiB of a virtio-mem device.

    Attributes:
        commands: (name, arguments) in order.
        refuses: names of commands that fail.
    """

    def __init__(self, takes: int = 1 << 20) -> None:
        self.takes = takes
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.refuses: set[str] = set()
        self._requested = 0

    async def execute(self, name: str, arguments: dict[str, Any], **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if name in self.refuses:
            raise VmmError(f"{name} refused")
        if name == "qom-get":
            return min(self._requested, self.takes << 20)
        self.commands.append((name, arguments))
        if name == "qom-set":
            self._requested = arguments["value"]
        return None

    def requested(self) -> list[int]:
        """MiB of each change of the device's size."""
        return [a["value"] >> 20 for name, a in self.commands if name == "qom-set"]

    def names(self) -> list[str]:
        return [name for name, _ in self.commands]


_CONFIG = VmConfig(
    id="a",
    state_dir=Path("/run/vm"),
    binary=Path("/qemu"),
    kernel=Path("/k"),
    memory_mib=256,
    max_memory_mib=1280,
    memory_slots=2,
)
_ELASTIC = replace(_CONFIG, virtio_mem=True)


def _place(_device_id: str) -> pci.PciSlot:
    return pci.bridge_slot(3)


async def test_dimms_are_whole_blocks_and_end_with_the_slots() -> None:
    qmp = FakeQmp()
    hot = HotMemory(qmp, _CONFIG)  # type: ignore[arg-type]
    assert await hot.resize(200, _place) == 256
    assert await hot.resize(257, _place) == 384
    assert await hot.resize(300, _place) == 384
    assert await hot.resize(1200, _place) == 1280
    assert qmp.names() == ["object-add", "device_add"] * 2
    assert hot.size_mib == 1280
    with pytest.raises(CapacityError, match="2000 MiB of memory asked for, this VM ends at 1280"):
        await hot.resize(2000, _place)
    hot = HotMemory(FakeQmp(), replace(_CONFIG, memory_slots=1))  # type: ignore[arg-type]
    await hot.resize(384, _place)
    with pytest.raises(CapacityError, match="no memory slot left: all 1 are taken"):
        await hot.resize(512, _place)


async def test_a_dimm_that_is_refused_leaves_nothing() -> None:
    qmp = FakeQmp()
    qmp.refuses = {"device_add"}
    hot = HotMemory(qmp, _CONFIG)  # type: ignore[arg-type]
    with pytest.raises(VmmError, match="device_add refused"):
        await hot.resize(384, _place)
    assert qmp.names() == ["object-add", "object-del"]
    qmp.refuses = set()
    assert await hot.resize(384, _place) == 384, "its id and slot are free"


async def test_one_device_for_all_that_may_be_added() -> None:
    qmp = FakeQmp()
    hot = HotMemory(qmp, _ELASTIC)  # type: ignore[arg-type]
    for mib, got in ((256, 256), (357, 360), (300, 300), (100, 256), (1280, 1280)):
        assert await hot.resize(mib, _place) == got
    assert qmp.requested() == [104, 44, 0, 1024]
    (backend,) = [a for name, a in qmp.commands if name == "object-add"]
    (device,) = [a for name, a in qmp.commands if name == "device_add"]
    assert backend["size"] == 1 << 30
    assert (device["driver"], device["memdev"]) == ("virtio-mem-pci", backend["id"])
    with pytest.raises(CapacityError, match="this VM ends at 1280 MiB"):
        await hot.resize(1281, _place)


async def test_a_guest_that_takes_too_little(autojump_clock: trio.testing.MockClock) -> None:
    qmp = FakeQmp(takes=64)
    hot = HotMemory(qmp, _ELASTIC)  # type: ignore[arg-type]
    assert await hot.resize(320, _place) == 320
    with pytest.raises(VmmError, match="the guest took 64 of 256 MiB of memory in 20 s"):
        await hot.resize(512, _place)
    assert qmp.requested() == [64, 256, 64], "it need not go on"


async def test_what_the_guest_gives_back_is_seen() -> None:
    hot = HotMemory(FakeQmp(), _ELASTIC)  # type: ignore[arg-type]
    await hot.resize(512, _place)
    assert hot.size_mib == 512
    data = {"id": hot_memory.DEVICE_ID, "size": 8 << 20}
    hot.on_event(Event("MEMORY_DEVICE_SIZE_CHANGE", data))
    assert hot.size_mib == 264


async def test_huge_pages_are_set_aside_as_they_are_used() -> None:
    qmp = FakeQmp()
    hot = HotMemory(qmp, replace(_ELASTIC, hugepages=True))  # type: ignore[arg-type]
    await hot.resize(512, _place)
    backend, device = (a for name, a in qmp.commands if name in ("object-add", "device_add"))
    assert "prealloc" not in backend
    assert backend["reserve"] is False
    assert device["prealloc"] is True
