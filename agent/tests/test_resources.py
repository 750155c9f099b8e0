# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from agent import resources, waiting
from agent.api import agent_pb2
from ttrpc.errors import Code, RpcError


def _cpus(sysfs: Path, present: str, online: str) -> Path:
    directory = sysfs / "devices/system/cpu"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "present").write_text(present + "\n")
    (directory / "online").write_text(online + "\n")
    up = resources.parse_cpu_list(online)
    for cpu in resources.parse_cpu_list(present):
        (directory / f"cpu{cpu}").mkdir(exist_ok=True)
        if cpu:  # the boot CPU has no such file
            (directory / f"cpu{cpu}/online").write_text(str(int(cpu in up)))
    return directory


def test_cpu_list() -> None:
    assert resources.parse_cpu_list("0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8]
    assert resources.parse_cpu_list("") == []


def test_only_as_many_cpus_as_asked(tmp_path: Path) -> None:
    directory = _cpus(tmp_path, "0-4", "0,2")
    assert resources.online_cpus(4, str(tmp_path)) == 2
    states = [(directory / f"cpu{cpu}/online").read_text() for cpu in (1, 2, 3, 4)]
    assert states == ["1", "1", "1", "0"]


def test_waits_for_cpus_that_come(tmp_path: Path) -> None:
    _cpus(tmp_path, "0", "0")
    request = agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=2, cpu_only=True)
    work = resources.online_cpu_mem(request, sysfs=str(tmp_path))
    step = next(work)
    assert isinstance(step, waiting.Wait)
    assert not step.ready()
    _cpus(tmp_path, "0-1", "0")
    assert not step.ready()  # written to, but the kernel says "online" only once it is
    _cpus(tmp_path, "0-1", "0-1")
    assert step.ready()
    with pytest.raises(StopIteration):
        work.send(None)


def test_memory(tmp_path: Path) -> None:
    directory = tmp_path / "devices/system/memory"
    for name, state in (("memory0", "online"), ("memory32", "offline"), ("memory33", "offline")):
        (directory / name).mkdir(parents=True)
        (directory / name / "state").write_text(state)
    (directory / "block_size_bytes").write_text("8000000\n")
    request = agent_pb2.OnlineCPUMemRequest(nb_cpus=0)
    waiting.run(resources.online_cpu_mem(request, sysfs=str(tmp_path)))
    for name in ("memory32", "memory33"):
        # a file keeps the end of what it held, where an attribute would not
        assert (directory / name / "state").read_text().startswith("online")
    assert resources.memory_block_size(str(tmp_path)) == 128 << 20
    assert not resources.supports_memory_probe(str(tmp_path))
    with pytest.raises(RpcError) as caught:
        resources.mem_hotplug_by_probe([1 << 30], str(tmp_path))
    assert caught.value.code == Code.NOT_FOUND
    (directory / "probe").touch()
    assert resources.supports_memory_probe(str(tmp_path))
    resources.mem_hotplug_by_probe([1 << 30], str(tmp_path))
    assert (directory / "probe").read_text() == "0x40000000"


def test_no_memory_hotplug_at_all(tmp_path: Path) -> None:
    assert resources.memory_block_size(str(tmp_path)) == 0
    assert resources.online_memory(str(tmp_path)) == 0


def test_version_1_cpusets_are_widened_from_the_top(tmp_path: Path) -> None:
    _cpus(tmp_path / "sys", "0-3", "0-3")
    for name in ("pods", "pods/p1", "pods/p1/c1", "pods/p1/c2"):
        (tmp_path / "cg/cpuset" / name).mkdir(parents=True)
        (tmp_path / "cg/cpuset" / name / "cpuset.cpus").write_text("0")
    resources.widen_cpusets(
        ["/pods/p1/c1", "/pods/p1/c2"], str(tmp_path / "sys"), str(tmp_path / "cg")
    )
    for path in (tmp_path / "cg/cpuset").rglob("cpuset.cpus"):
        assert path.read_text() == "0-3"


def test_version_2_cpusets_follow_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "cpuset").mkdir()
    (tmp_path / "cgroup.controllers").touch()
    resources.widen_cpusets(["/c1"], cgroup_root=str(tmp_path))


def test_swap_of_nothing() -> None:
    with pytest.raises(RpcError) as caught:
        waiting.run(resources.add_swap([]))
    assert caught.value.code == Code.INVALID_ARGUMENT
    with pytest.raises(RpcError) as caught:
        resources.add_swap_path("/dev/none")
    assert caught.value.code == Code.NOT_FOUND
