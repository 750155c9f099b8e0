# SPDX-License-Identifier: Apache-2.0
"""How large a VM has to be."""

from __future__ import annotations

import pytest

from agent.api import oci_pb2
from shimv2.api import cri_pb2
from shimv2.resources import (
    Demand,
    Size,
    demand_of,
    numbers,
    pod_annotations,
    pod_demand,
    union,
    wanted_size,
)
from shimv2.spec import SpecError
from vmm.errors import CapacityError

_GIB = 1 << 30
_MOST = Size(8, 16384)


def _resources(quota: int = 0, period: int = 0, limit: int = 0) -> oci_pb2.LinuxResources:
    return oci_pb2.LinuxResources(
        CPU=oci_pb2.LinuxCPU(Quota=quota, Period=period), Memory=oci_pb2.LinuxMemory(Limit=limit)
    )


@pytest.mark.parametrize(
    ("quota", "period", "limit", "demand"),
    [
        (150000, 100000, _GIB, Demand(1.5, _GIB)),
        (-1, 100000, 0, Demand()),
        (100000, 0, -1, Demand()),
        (0, 100000, 0, Demand()),
    ],
)
def test_what_a_spec_asks_for(quota: int, period: int, limit: int, demand: Demand) -> None:
    assert demand_of(_resources(quota, period, limit)) == demand


def test_an_update_changes_only_what_it_names() -> None:
    before = Demand(1.5, _GIB)
    assert before.updated(_resources(limit=2 * _GIB)) == Demand(1.5, 2 * _GIB)
    assert before.updated(_resources(quota=200000, period=100000)) == Demand(2.0, _GIB)
    assert before.updated(_resources(quota=-1, limit=-1)) == Demand()


@pytest.mark.parametrize(
    ("own", "cpus", "vcpus"),
    [(1.0, [], 1), (1.0, [0.5], 2), (0.5, [0.5], 1), (0.7, [0.1, 0.2], 1), (1.0, [100.0], 8)],
)
def test_vcpus_are_rounded_up_and_cut_at_the_maximum(
    own: float, cpus: list[float], vcpus: int
) -> None:
    assert wanted_size(own, 256, [Demand(c) for c in cpus], _MOST) == Size(vcpus, 256)


def test_memory_is_the_sum_of_the_limits() -> None:
    assert wanted_size(1, 256, [Demand(0, _GIB), Demand(0, _GIB)], _MOST) == Size(1, 2304)


def test_memory_above_the_maximum_is_an_error_that_says_both() -> None:
    with pytest.raises(CapacityError, match=r"16384 MiB.*256 MiB.*16640 MiB.*allow 16384"):
        wanted_size(1, 256, [Demand(0, 16 * _GIB)], _MOST)


def test_huge_pages_count_as_memory() -> None:
    limits = [
        oci_pb2.LinuxHugepageLimit(Pagesize="2MB", Limit=_GIB),
        oci_pb2.LinuxHugepageLimit(Pagesize="1GB", Limit=_GIB),
    ]
    demand = demand_of(oci_pb2.LinuxResources(HugepageLimits=limits))
    assert demand == Demand(hugepages=2 * _GIB)
    assert demand.updated(_resources(limit=_GIB)) == Demand(0, _GIB, 2 * _GIB)
    assert wanted_size(1, 256, [demand, Demand(0, _GIB)], _MOST).memory_mib == 256 + 3072


def _cpuset(cpus: str, mems: str = "") -> oci_pb2.LinuxResources:
    return oci_pb2.LinuxResources(CPU=oci_pb2.LinuxCPU(Cpus=cpus, Mems=mems))


def test_cpusets_count_where_there_is_no_quota() -> None:
    one, two = demand_of(_cpuset("0-1")), demand_of(_cpuset("1,3", "0"))
    assert wanted_size(1, 256, [one, two], _MOST).vcpus == 4
    assert wanted_size(1, 256, [one, two, Demand(0.5)], _MOST).vcpus == 2, "a quota goes first"
    assert two.updated(_cpuset("2")) == Demand(cpuset="2", memory_nodes="0")


@pytest.mark.parametrize("text", ["a", "0-", "-3", "3-1", "0-99999999", "1,,2", "0x1"])
def test_what_is_no_cpuset_is_named(text: str) -> None:
    with pytest.raises(SpecError, match=r"resources\.cpu\.cpus"):
        demand_of(_cpuset(text))


def test_lists_of_the_kernel() -> None:
    assert numbers("0-2, 5", "cpus") == {0, 1, 2, 5}
    assert union(["0-1", "1,7"]) == "0,1,7"
    assert union(["0-1", ""]) == "", "one that may run anywhere"
    assert union([]) == ""


_CRI = "io.kubernetes.cri.sandbox-"


@pytest.mark.parametrize(
    ("said", "demand"),
    [
        ({}, None),
        ({"other": "1"}, None),
        (
            {_CRI + "cpu-quota": "150000", _CRI + "cpu-period": "100000", _CRI + "memory": "1024"},
            Demand(1.5, 1024),
        ),
        ({_CRI + "memory": str(_GIB)}, Demand(0, _GIB)),
        ({_CRI + "cpu-quota": "-1", _CRI + "cpu-period": "100000"}, Demand()),
        ({_CRI + "cpu-quota": "-1", _CRI + "cpu-shares": "1025"}, Demand(2)),
        ({_CRI + "cpu-quota": "100000", _CRI + "cpu-period": "0"}, Demand()),
        ({_CRI + "cpu-quota": "lots", _CRI + "memory": "-1"}, Demand()),
        (
            {
                "pod-linux-resources.crio.io": '{"cpu_period": 100000, "cpu_quota": 50000,'
                ' "memory_limit_in_bytes": 4096, "unified": {}}'
            },
            Demand(0.5, 4096),
        ),
        ({"io.kubernetes.cri-o.PodLinuxResources": '{"memory_limit_in_bytes": 1}'}, Demand(0, 1)),
        ({"io.kubernetes.cri-o.PodLinuxResources": "[]"}, Demand()),
        ({"io.kubernetes.cri-o.PodLinuxResources": "{"}, Demand()),
    ],
)
def test_what_engines_say_of_a_pod(said: dict[str, str], demand: Demand | None) -> None:
    assert pod_demand(said) == demand


def test_the_sandbox_api_says_the_same() -> None:
    resources = cri_pb2.LinuxContainerResources(
        cpu_period=100000, cpu_quota=50000, memory_limit_in_bytes=_GIB
    )
    assert pod_demand(pod_annotations(resources)) == Demand(0.5, _GIB)
