# SPDX-License-Identifier: Apache-2.0
"""Memory that comes and goes, in real VMs."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import trio

from vmm.errors import CapacityError
from vmm.hypervisor import BalloonDevice, VmConfig
from vmm.qemu import Qemu, memory

pytestmark = pytest.mark.vm

_TOTAL = "busybox awk '/MemTotal/{print $2}' /proc/meminfo"


async def _until(condition: Any, what: str) -> None:
    with trio.fail_after(20):
        while not await condition():
            await trio.sleep(0.1)  # the guest's kernel tells nobody when it has done it
    assert await condition(), what


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


async def test_freed_memory_goes_back_to_the_host(vm_config: VmConfig, boot: Any) -> None:
    config = replace(vm_config, memory_mib=256, max_memory_mib=256)
    async with boot(config, BalloonDevice("balloon0")) as (vm, shell):
        status, _ = await shell.run(
            "busybox mkdir -p /mnt/big; busybox mount -t tmpfs -o size=160m none /mnt/big &&"
            " busybox dd if=/dev/urandom of=/mnt/big/file bs=1M count=96 2>/dev/null"
        )
        assert status == 0
        resident = (await vm.metrics()).rss_bytes >> 20
        full = _blocks(vm)
        await shell.run("busybox rm /mnt/big/file")

        async def is_back() -> bool:
            return _blocks(vm) <= full - 80

        await _until(is_back, "the file has holes again")
        assert (await vm.metrics()).rss_bytes >> 20 <= resident - 80
