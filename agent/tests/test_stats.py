# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from agent import stats
from ttrpc.errors import Code, RpcError

NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0: 5000000    4000    3    2    0     0          0         1    70000     600    5    4    0     0       0          0
"""


def _tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _proc(tmp_path: Path) -> str:
    _tree(tmp_path / "proc", {"net/dev": NET_DEV})
    return str(tmp_path / "proc")


def test_version_2(tmp_path: Path) -> None:
    _tree(
        tmp_path / "cg",
        {
            "cgroup.controllers": "cpu memory\n",
            "k/c1/cpu.stat": "usage_usec 2500\nuser_usec 2000\nsystem_usec 500\nnr_periods 4\n"
            "nr_throttled 1\nthrottled_usec 7\n",
            "k/c1/memory.stat": "anon 4096\nfile 8192\nkernel 512\npgfault 9\n",
            "k/c1/memory.current": "12800\n",
            "k/c1/memory.peak": "20000\n",
            "k/c1/memory.max": "max\n",
            "k/c1/memory.events": "low 0\nhigh 0\nmax 6\noom 1\noom_kill 1\n",
            "k/c1/memory.swap.current": "64\n",
            "k/c1/memory.swap.max": "1024\n",
            "k/c1/pids.current": "3\n",
            "k/c1/pids.max": "100\n",
            "k/c1/io.stat": "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\nodd\n",
            "k/c1/hugetlb.2MB.current": "2097152\n",
            "k/c1/hugetlb.2MB.rsvd.current": "1\n",
            "k/c1/hugetlb.2MB.events": "max 5\n",
        },
    )
    answer = stats.container_stats("/k/c1", root=str(tmp_path / "cg"), proc=_proc(tmp_path))
    group = answer.cgroup_stats
    assert group.cpu_stats.cpu_usage.total_usage == 2_500_000
    assert group.cpu_stats.cpu_usage.usage_in_usermode == 2_000_000
    assert group.cpu_stats.cpu_usage.usage_in_kernelmode == 500_000
    assert group.cpu_stats.throttling_data.throttled_time == 7000
    assert group.memory_stats.usage.usage == 12800
    assert group.memory_stats.usage.max_usage == 20000
    assert group.memory_stats.usage.limit == stats.UNLIMITED
    assert group.memory_stats.usage.failcnt == 6
    assert group.memory_stats.swap_usage.limit == 1024
    assert group.memory_stats.kernel_usage.usage == 512
    assert group.memory_stats.cache == 8192
    assert dict(group.memory_stats.stats) == {
        "anon": 4096,
        "file": 8192,
        "kernel": 512,
        "pgfault": 9,
        "oom": 1,
        "oom_kill": 1,
    }
    assert (group.pids_stats.current, group.pids_stats.limit) == (3, 100)
    transferred = group.blkio_stats.io_service_bytes_recursive
    assert [(e.major, e.minor, e.op, e.value) for e in transferred] == [
        (254, 0, "read", 4096),
        (254, 0, "write", 8192),
    ]
    assert [e.value for e in group.blkio_stats.io_serviced_recursive] == [1, 2]
    assert list(group.hugetlb_stats) == ["2MB"]
    assert group.hugetlb_stats["2MB"].usage == 2097152
    assert group.hugetlb_stats["2MB"].failcnt == 5
    names = {entry.name: entry for entry in answer.network_stats}
    assert set(names) == {"lo", "eth0"}
    assert (names["eth0"].rx_bytes, names["eth0"].rx_dropped) == (5000000, 2)
    assert (names["eth0"].tx_packets, names["eth0"].tx_errors) == (600, 5)


def test_version_1(tmp_path: Path) -> None:
    _tree(
        tmp_path / "cg",
        {
            "cpuacct/c1/cpuacct.usage": "123456\n",
            "cpuacct/c1/cpuacct.usage_percpu": "100000 23456\n",
            "cpuacct/c1/cpuacct.stat": "user 3\nsystem 2\n",
            "cpu/c1/cpu.stat": "nr_periods 9\nnr_throttled 2\nthrottled_time 55\n",
            "memory/c1/memory.stat": "cache 4096\nrss 8192\ntotal_rss 8192\n",
            "memory/c1/memory.usage_in_bytes": "12288\n",
            "memory/c1/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/c1/memory.failcnt": "4\n",
            "memory/c1/memory.use_hierarchy": "1\n",
            "memory/c1/memory.memsw.usage_in_bytes": "12289\n",
            "pids/c1/pids.current": "2\n",
            "pids/c1/pids.max": "max\n",
            "blkio/c1/blkio.throttle.io_service_bytes_recursive": "8:0 Read 1\n8:0 Write 2\nTotal 3\n",
            "hugetlb/c1/hugetlb.2MB.usage_in_bytes": "0\n",
        },
    )
    group = stats.container_stats(
        "c1", root=str(tmp_path / "cg"), proc=_proc(tmp_path)
    ).cgroup_stats
    assert group.cpu_stats.cpu_usage.total_usage == 123456
    assert list(group.cpu_stats.cpu_usage.percpu_usage) == [100000, 23456]
    assert group.cpu_stats.cpu_usage.usage_in_usermode == 30_000_000
    assert group.cpu_stats.throttling_data.throttled_time == 55
    assert group.memory_stats.use_hierarchy
    assert group.memory_stats.usage.limit == 9223372036854771712
    assert group.memory_stats.swap_usage.usage == 12289
    assert group.memory_stats.stats["total_rss"] == 8192
    assert (group.pids_stats.current, group.pids_stats.limit) == (2, 0)
    assert [(e.op, e.value) for e in group.blkio_stats.io_service_bytes_recursive] == [
        ("Read", 1),
        ("Write", 2),
    ]
    assert "2MB" in group.hugetlb_stats


@pytest.mark.parametrize("version", ["cgroup.controllers", "cpu/cpu.stat"])
def test_unknown_cgroup(tmp_path: Path, version: str) -> None:
    _tree(tmp_path, {version: ""})
    with pytest.raises(RpcError) as caught:
        stats.container_stats("/none", root=str(tmp_path))
    assert caught.value.code == Code.NOT_FOUND


def test_empty_cgroup_gives_zeros(tmp_path: Path) -> None:
    _tree(tmp_path, {"cgroup.controllers": "", "c/cgroup.procs": ""})
    answer = stats.container_stats("c", root=str(tmp_path), proc=str(tmp_path))
    assert answer.cgroup_stats.memory_stats.usage.usage == 0
    assert not answer.network_stats
