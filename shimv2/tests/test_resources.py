# SPDX-License-Identifier: Apache-2.0
"""How large a VM has to be."""

from __future__ import annotations

import pytest

from agent.api import oci_pb2
from shimv2.resources import Demand, Size, demand_of, wanted_size
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
