# SPDX-License-Identifier: Apache-2.0
"""Swap space: how much, its file, its header; and what is asked of VM and guest."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.api import oci_pb2
from shimv2.guest_spec import guest_spec, resources_of
from shimv2.resources import Demand, demand_of, wanted_swap
from shimv2.spec import Spec, SpecError
from shimv2.swap import GuestSwap, swap_header
from vmm.errors import CapacityError
from vmm.hypervisor import BlockDevice, DeviceAddress

_MIB = 1 << 20
_ASKS = "io.katacontainers.container.resource."


def test_how_much() -> None:
    asks = {"swappiness": 60}
    assert wanted_swap(256, [Demand(memory=_MIB)]) == 0, "nobody asks"
    assert wanted_swap(256, [Demand(memory=_MIB, swap=3 * _MIB, **asks)]) == 2 * _MIB
    assert wanted_swap(256, [Demand(memory=_MIB, swap=_MIB, **asks)]) == 0, "no swap, in words"
    assert wanted_swap(256, [Demand(memory=_MIB, **asks)] * 2) == 2 * _MIB
    assert wanted_swap(256, [Demand(**asks)] * 2) == 256 * _MIB, "once for the pod"


def test_an_update_of_it() -> None:
    before = Demand(memory=_MIB, swap=2 * _MIB, swappiness=60)
    more = oci_pb2.LinuxResources(Memory=oci_pb2.LinuxMemory(Swap=3 * _MIB))
    assert before.updated(more) == Demand(memory=_MIB, swap=3 * _MIB, swappiness=60)
    unlimited = oci_pb2.LinuxResources(Memory=oci_pb2.LinuxMemory(Swap=-1))
    assert before.updated(unlimited) == before


def _spec(annotations: dict[str, str]) -> Spec:
    document = {
        "annotations": annotations,
        "root": {"path": "rootfs"},
        "linux": {"resources": {"memory": {"limit": _MIB, "swap": _MIB}}},
    }
    return Spec(json.loads(json.dumps(document)), Path("/bundle"))


def test_annotations_ask_for_it() -> None:
    spec = _spec({_ASKS + "swappiness": "60", _ASKS + "swap_in_bytes": str(3 * _MIB)})
    demand = demand_of(resources_of(spec))
    assert demand == Demand(memory=_MIB, swap=3 * _MIB, swappiness=60)

    def in_guest(swap: bool) -> int:
        made = guest_spec(spec, root_path="/r", mounts=[], swap=swap).message
        return int(made.Linux.Resources.Memory.Swap)

    assert in_guest(True) == 3 * _MIB
    assert in_guest(False) == _MIB, "as the engine has it"


@pytest.mark.parametrize(
    ("name", "value"), [("swappiness", "101"), ("swappiness", "-1"), ("swap_in_bytes", "1G")]
)
def test_an_annotation_that_cannot_be_is_named(name: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"{name}\]: must be between 0 .* is '{value}'"):
        resources_of(_spec({_ASKS + name: value}))


def test_the_header_is_one_that_tools_know(tmp_path: Path) -> None:
    file = tmp_path / "swap"
    file.write_bytes(swap_header(16) + bytes(15 * 4096))
    told = subprocess.check_output(["/sbin/blkid", "-p", "-o", "export", file], text=True)
    assert "TYPE=swap\n" in told
    assert "VERSION=1\n" in told


class FakeGuest:
    """Attributes: disks: sizes of the files that were plugged; slots: told to the agent."""

    def __init__(self) -> None:
        self.disks: list[int] = []
        self.slots: list[list[int]] = []

    async def add_device(self, device: BlockDevice) -> DeviceAddress:
        with device.path.open("rb") as file:
            assert file.read(4096)[-10:] == b"SWAPSPACE2"
        self.disks.append(device.path.stat().st_size)
        return DeviceAddress(pci_path=f"02/{len(self.disks) + 9:02x}")

    async def call(self, method: str, request: Any) -> None:
        assert method == "AddSwap"
        self.slots.append(list(request.PCIPath))


async def test_it_only_grows_and_leaves_no_name_and_no_descriptor(tmp_path: Path) -> None:
    guest = FakeGuest()
    swap = GuestSwap(tmp_path / "some" / "where", guest)  # type: ignore[arg-type]
    before = len(os.listdir("/proc/self/fd"))
    for size in (0, 1, 10 * _MIB, 5 * _MIB, 12 * _MIB):
        await swap.cover(size)
    assert guest.disks == [11 * 4096, 10 * _MIB + 4096, 2 * _MIB + 4096]
    assert guest.slots == [[2, 10], [2, 11], [2, 12]]
    assert not list((tmp_path / "some" / "where").iterdir())
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    swap = GuestSwap(tmp_path / "file" / "swap", FakeGuest())  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match=r"guest_swap_path = '.*file/swap': Not a directory"):
        await swap.cover(_MIB)
