# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from agent.api import agent_pb2
from shimv2.api import cgroups_v1_pb2, cgroups_v2_pb2
from shimv2.stats import add_stats, to_containerd


def reply() -> agent_pb2.StatsContainerResponse:
    message = agent_pb2.StatsContainerResponse()
    stats = message.cgroup_stats
    stats.pids_stats.current, stats.pids_stats.limit = 3, 100
    stats.cpu_stats.cpu_usage.total_usage = 5_000_000
    stats.cpu_stats.cpu_usage.usage_in_usermode = 3_000_000
    stats.memory_stats.usage.usage, stats.memory_stats.usage.limit = 1 << 20, 1 << 30
    stats.memory_stats.stats.update({"inactive_file": 4096, "anon": 7, "pgfault": 9, "odd": 1})
    stats.memory_stats.stats["oom_kill"] = 6
    entries = stats.blkio_stats
    entries.io_service_bytes_recursive.add(major=8, minor=1, op="Read", value=512)
    entries.io_service_bytes_recursive.add(major=8, minor=1, op="Write", value=1024)
    entries.io_serviced_recursive.add(major=8, minor=1, op="Read", value=2)
    stats.hugetlb_stats["2MB"].usage = 11
    message.network_stats.add(name="eth0", rx_bytes=10, tx_dropped=1)
    return message


def test_version_1():
    metrics = to_containerd(reply(), unified=False)
    assert isinstance(metrics, cgroups_v1_pb2.Metrics)
    assert (metrics.pids.current, metrics.pids.limit) == (3, 100)
    assert (metrics.cpu.usage.total, metrics.cpu.usage.user) == (5_000_000, 3_000_000)
    assert metrics.memory.usage.usage == 1 << 20
    assert metrics.memory.usage.limit == 1 << 30
    assert metrics.memory.total_inactive_file == 4096
    assert metrics.memory.pg_fault == 9
    assert metrics.memory_oom_control.oom_kill == 6
    assert [e.value for e in metrics.blkio.io_service_bytes_recursive] == [512, 1024]
    assert metrics.hugetlb[0].pagesize == "2MB"
    assert metrics.network[0].rx_bytes == 10


def test_version_2():
    metrics = to_containerd(reply(), unified=True)
    assert isinstance(metrics, cgroups_v2_pb2.Metrics)
    assert metrics.memory_events.oom_kill == 6
    assert (metrics.cpu.usage_usec, metrics.cpu.user_usec) == (5000, 3000)
    assert (metrics.memory.usage, metrics.memory.anon) == (1 << 20, 7)
    entry = metrics.io.usage[0]
    assert (entry.rbytes, entry.wbytes, entry.rios) == (512, 1024, 2)
    assert metrics.network[0].tx_dropped == 1


def test_a_guest_s_lists_are_cut():
    message = agent_pb2.StatsContainerResponse()
    for _ in range(5000):
        message.network_stats.add(name="x")
    assert len(to_containerd(message, unified=True).network) == 1024


def test_a_sum_adds_figures_and_counts_the_network_once():
    total = agent_pb2.StatsContainerResponse()
    add_stats(total, reply())
    add_stats(total, reply())
    assert total.cgroup_stats.cpu_stats.cpu_usage.total_usage == 10_000_000
    assert total.cgroup_stats.memory_stats.stats["anon"] == 14
    assert total.cgroup_stats.hugetlb_stats["2MB"].usage == 22
    assert len(total.network_stats) == 1


def test_a_sum_without_limits_has_none():
    total = agent_pb2.StatsContainerResponse()
    for _ in range(3):
        one = reply()
        memory = one.cgroup_stats.memory_stats
        memory.usage.limit = memory.stats["anon"] = (1 << 64) - 1
        memory.use_hierarchy = True
        add_stats(total, one)
    memory = total.cgroup_stats.memory_stats
    assert memory.usage.limit == memory.stats["anon"] == (1 << 64) - 1
    assert memory.usage.usage == 3 << 20
    assert memory.use_hierarchy
    assert to_containerd(total, unified=False).memory.usage.limit == (1 << 64) - 1
