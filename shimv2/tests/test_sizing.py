# SPDX-License-Identifier: Apache-2.0
"""When a VM grows and shrinks, without one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.api import oci_pb2
from shimv2.cgroups import CgroupError
from shimv2.config import Config, load_config
from shimv2.resources import Demand, Size
from shimv2.sizing import Sizing, workload
from shimv2.spec import Spec
from shimv2.vm_settings import fixed_size, most_size, own_size, vm_config
from vmm.errors import CapacityError, VmmError
from vmm.hypervisor import Capabilities, Placement

_MIB = 1 << 20
_ALL = Capabilities(vcpu_hotplug=True, vcpu_unplug=True, memory_hotplug=True, memory_unplug=True)


class FakeVm:
    """Attributes: refuses: raised by the next resize."""

    def __init__(self, able: Capabilities) -> None:
        self.capabilities = able
        self.config = SimpleNamespace(vcpus=1, max_vcpus=4, memory_mib=256, max_memory_mib=4096)
        self.size = Size(1, 256)
        self.refuses: VmmError | None = None

    async def resize_vcpus(self, count: int) -> int:
        self._refuse()
        self.size = Size(count, self.size.memory_mib)
        return count

    async def resize_memory(self, mib: int) -> int:
        self._refuse()
        self.size = Size(self.size.vcpus, -(-mib // 128) * 128)
        return self.size.memory_mib

    def _refuse(self) -> None:
        if self.refuses is not None:
            error, self.refuses = self.refuses, None
            raise error


class FakeGuest:
    """Attributes: onlined: (nb_cpus, cpu_only) of each OnlineCPUMem."""

    def __init__(self, able: Capabilities) -> None:
        self.vm = FakeVm(able)
        self.onlined: list[tuple[int, bool]] = []

    async def call(self, method: str, request: Any) -> None:
        assert method == "OnlineCPUMem"
        self.onlined.append((request.nb_cpus, request.cpu_only))

    async def vcpu_threads(self) -> list[int]:
        return [100, 101]


class FakePlacement:
    def __init__(self) -> None:
        self.threads: list[int] = []
        self.confined = "", ""

    async def add_vcpu_threads(self, threads: Iterable[int]) -> None:
        self.threads = list(threads)

    def confine(self, cpus: str, nodes: str) -> None:
        if cpus == "9":
            raise CgroupError("no such CPU")
        self.confined = cpus, nodes


class Scene:
    def __init__(self, config: Config, able: Capabilities = _ALL, fixed: Size | None = None):
        self.guest = FakeGuest(able)
        self.placement = FakePlacement()
        self.sizing = Sizing(config, self.guest, self.placement, fixed)  # type: ignore[arg-type]

    @property
    def size(self) -> Size:
        return self.guest.vm.size


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return _config(tmp_path, "")


def _config(directory: Path, text: str) -> Config:
    file = directory / "configuration.toml"
    file.write_text(f"[hypervisor.qemu]\ndefault_vcpus = 1\ndefault_memory = 256\n{text}")
    return load_config(file)


def _resources(cpus: float = 0, mib: int = 0, cpuset: str = "") -> oci_pb2.LinuxResources:
    return oci_pb2.LinuxResources(
        CPU=oci_pb2.LinuxCPU(Quota=int(cpus * 100000), Period=100000, Cpus=cpuset),
        Memory=oci_pb2.LinuxMemory(Limit=mib * _MIB),
    )


async def test_it_grows_with_each_container_and_shrinks_with_its_removal(config: Config) -> None:
    scene = Scene(config)
    await scene.sizing.add("a", _resources(0.5, 256))
    await scene.sizing.add("b", _resources(0.5, 128))
    assert scene.size == Size(2, 640)
    assert scene.guest.onlined == [(0, False), (2, True), (0, False)]
    assert scene.placement.threads == [100, 101]
    scene.sizing.forget("a")
    await scene.sizing.shrink()
    assert scene.size == Size(2, 384)
    scene.sizing.forget("b")
    await scene.sizing.shrink()
    assert scene.size == Size(1, 256)


async def test_an_update_grows_before_the_guest_s_cgroups_and_shrinks_after(config: Config) -> None:
    scene = Scene(config)
    await scene.sizing.add("a", _resources(2, 512))
    await scene.sizing.update("a", _resources(1, 128))
    assert scene.size == Size(3, 768), "the old limits still hold"
    await scene.sizing.shrink()
    assert scene.size == Size(2, 384)
    await scene.sizing.update("a", _resources(mib=256))
    assert scene.size == Size(2, 512), "the quota that was not named stays"


async def test_what_cannot_be_unplugged_stays_and_is_used_again(config: Config) -> None:
    scene = Scene(config, Capabilities(vcpu_hotplug=True, memory_hotplug=True))
    await scene.sizing.add("a", _resources(1, 256))
    scene.sizing.forget("a")
    await scene.sizing.shrink()
    assert scene.size == Size(2, 512)
    scene.guest.onlined.clear()
    await scene.sizing.add("b", _resources(1, 256))
    assert not scene.guest.onlined


async def test_a_vm_without_hot_plug_takes_every_limit(config: Config) -> None:
    scene = Scene(config, Capabilities())
    await scene.sizing.add("a", _resources(1, 1 << 20))
    assert scene.size == Size(1, 256)


async def test_what_is_refused_is_not_counted(config: Config) -> None:
    scene = Scene(config)
    with pytest.raises(CapacityError, match="4096 MiB"):
        await scene.sizing.add("a", _resources(mib=8192))
    scene.guest.vm.refuses = CapacityError("no memory slot left")
    with pytest.raises(CapacityError, match="memory for the sandbox's containers: no memory slot"):
        await scene.sizing.add("a", _resources(mib=256))
    await scene.sizing.add("b", _resources(mib=128))
    assert scene.size == Size(1, 384)


async def test_what_ends_while_the_vm_grows_does_not_count(config: Config) -> None:
    scene = Scene(config)
    await scene.sizing.add("a", _resources(1, 256))

    async def end_of_a(_threads: object = None) -> list[int]:
        scene.sizing.forget("a")
        return []

    scene.guest.vcpu_threads = end_of_a  # type: ignore[method-assign]
    await scene.sizing.add("b", _resources(1, 256))
    await scene.sizing.shrink()
    assert scene.size == Size(2, 512)


async def test_a_failed_unplug_is_no_error(config: Config) -> None:
    scene = Scene(config)
    await scene.sizing.add("a", _resources(1, 256))
    scene.sizing.forget("a")
    scene.guest.vm.refuses = VmmError("the guest keeps it")
    await scene.sizing.shrink()
    assert scene.size == Size(2, 512)
    await scene.sizing.shrink()
    assert scene.size == Size(1, 256), "tried again the next time"


async def test_the_vcpus_run_where_the_containers_may(config: Config) -> None:
    scene = Scene(config)
    await scene.sizing.add("a", _resources(cpuset="2"))
    assert scene.placement.confined == ("2", "")
    assert scene.size.vcpus == 2
    await scene.sizing.add("b", _resources(cpuset="0-1"))
    assert scene.placement.confined == ("0,1,2", "")
    await scene.sizing.add("c", _resources())
    assert scene.placement.confined == ("", "")
    scene.sizing.forget("c")
    await scene.sizing.shrink()
    assert scene.placement.confined == ("0,1,2", "")
    await scene.sizing.update("a", _resources(cpuset="9"))
    scene.sizing.forget("b")
    await scene.sizing.shrink()  # one that the host doesn't have is warned of


async def test_a_fixed_size_is_reached_once_and_kept(config: Config) -> None:
    scene = Scene(config, fixed=Size(2, 512))
    await scene.sizing.settle()
    assert scene.size == Size(2, 512)
    await scene.sizing.add("a", _resources(2, 1024))
    await scene.sizing.update("a", _resources(1, 2048))
    scene.sizing.forget("a")
    await scene.sizing.shrink()
    assert scene.size == Size(2, 512)


async def test_a_vm_that_follows_has_nothing_to_settle(config: Config) -> None:
    scene = Scene(config)
    await scene.sizing.settle()
    assert scene.size == Size(1, 256)


# --- fixed sizes ------------------------------------------------------------------------


def _spec(annotations: dict[str, str], resources: object = None) -> Spec:
    document = {"annotations": annotations, "linux": {"resources": resources}}
    return Spec(json.loads(json.dumps(document)), Path("/bundle"))


_STATIC = "[runtime]\nstatic_sandbox_resource_mgmt = true\n"
_POD = {
    "io.kubernetes.cri.container-type": "sandbox",
    "io.kubernetes.cri.sandbox-memory": str(512 * _MIB),
}
_OWN = {"memory": {"limit": 256 * _MIB}, "cpu": {"quota": 150000, "period": 100000}}


def test_the_workload_of_a_fixed_size(tmp_path: Path, config: Config) -> None:
    static = _config(tmp_path, _STATIC)
    assert workload(config, _spec(_POD)) is None, "it follows its containers"
    assert workload(static, _spec(_POD, _OWN)) == Demand(0, 512 * _MIB), "not the pause container's"
    assert workload(static, _spec({}, _OWN)) == Demand(1.5, 256 * _MIB)
    assert workload(static, _spec({"io.kubernetes.cri.container-type": "sandbox"})) == Demand()


def test_a_fixed_size_has_no_headroom(tmp_path: Path) -> None:
    static = _config(tmp_path, _STATIC)
    most = most_size(static)
    size = fixed_size(static, Demand(0.5, 100 * _MIB))
    assert size == Size(min(2, most.vcpus), 356)
    made = vm_config(static, "sandbox", Placement(), fixed=size)
    assert (made.vcpus, made.max_vcpus) == (size.vcpus, size.vcpus)
    assert (made.memory_mib, made.max_memory_mib) == (356, 356)
    assert fixed_size(static, Demand(1000)).vcpus == most.vcpus
    with pytest.raises(CapacityError, match="default_maxmemory"):
        fixed_size(static, Demand(0, most.memory_mib * _MIB))


def test_sizes_of_a_vm_that_follows(tmp_path: Path) -> None:
    config = _config(tmp_path, "default_maxmemory = 100\n")
    assert own_size(config) == Size(1, 256)
    assert most_size(config).memory_mib == 256, "no less than it boots with"
