# SPDX-License-Identifier: Apache-2.0
"""A container's statistics: from the agent's message to containerd's, v1 or v2.

containerd's clients expect the type of the host's own cgroup mode; the values are the
guest's.  They are numbers a hostile guest may invent, and are passed on as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from agent.api import agent_pb2
from shimv2.api import cgroups_v1_pb2, cgroups_v2_pb2

_ENTRY_LIMIT = 1024  # interfaces, devices, page sizes: what of the guest's lists is read
_LARGEST = (1 << 64) - 1

Metrics = cgroups_v1_pb2.Metrics | cgroups_v2_pb2.Metrics

_V1_MEMORY_FIELDS = frozenset(
    field.name
    for field in cgroups_v1_pb2.MemoryStat.DESCRIPTOR.fields
    if field.message_type is None
)
_V2_MEMORY_FIELDS = frozenset(
    field.name
    for field in cgroups_v2_pb2.MemoryStat.DESCRIPTOR.fields
    if field.message_type is None
)
# memory.stat of v1 writes some names without the separators of the message.
_V1_NAMES = {
    "pgpgin": "pg_pg_in",
    "pgpgout": "pg_pg_out",
    "pgfault": "pg_fault",
    "pgmajfault": "pg_maj_fault",
    "total_pgpgin": "total_pg_pg_in",
    "total_pgpgout": "total_pg_pg_out",
    "total_pgfault": "total_pg_fault",
    "total_pgmajfault": "total_pg_maj_fault",
    "hierarchical_memsw_limit": "hierarchical_swap_limit",
}


def host_is_unified(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether the host runs cgroup v2 alone."""
    return (root / "cgroup.controllers").exists()


def to_containerd(reply: agent_pb2.StatsContainerResponse, *, unified: bool) -> Metrics:
    """containerd's Metrics message of the wanted version."""
    return _to_v2(reply) if unified else _to_v1(reply)


def add_stats(
    total: agent_pb2.StatsContainerResponse, other: agent_pb2.StatsContainerResponse
) -> None:
    """Add a container's figures to a sandbox's; the network is the pod's and counts once."""
    _add(total.cgroup_stats, other.cgroup_stats)
    if not total.network_stats:
        total.network_stats.extend(other.network_stats)


def _add(total: Message, other: Message) -> None:
    for field, value in other.ListFields():
        if field.message_type is None:
            if not field.is_repeated:
                setattr(total, field.name, _sum(getattr(total, field.name), value))
        elif field.message_type.GetOptions().map_entry:
            target = getattr(total, field.name)
            for key in value:
                if isinstance(value[key], int):
                    target[key] = _sum(target[key], value[key])
                else:
                    _add(target[key], value[key])
        elif field.is_repeated:
            getattr(total, field.name).extend(value)
        else:
            _add(getattr(total, field.name), value)


def _sum(one: int, other: int) -> int:
    """No limit is the largest number, and so are two of them."""
    return one or other if isinstance(other, bool) else min(one + other, _LARGEST)


def _to_v1(reply: agent_pb2.StatsContainerResponse) -> cgroups_v1_pb2.Metrics:
    source = reply.cgroup_stats
    out = cgroups_v1_pb2.Metrics()
    out.pids.current = source.pids_stats.current
    out.pids.limit = source.pids_stats.limit
    usage = source.cpu_stats.cpu_usage
    out.cpu.usage.total = usage.total_usage
    out.cpu.usage.kernel = usage.usage_in_kernelmode
    out.cpu.usage.user = usage.usage_in_usermode
    out.cpu.usage.per_cpu.extend(usage.percpu_usage[:_ENTRY_LIMIT])
    throttling = source.cpu_stats.throttling_data
    out.cpu.throttling.periods = throttling.periods
    out.cpu.throttling.throttled_periods = throttling.throttled_periods
    out.cpu.throttling.throttled_time = throttling.throttled_time
    memory = source.memory_stats
    _set_known(out.memory, memory.stats, _V1_MEMORY_FIELDS, _V1_NAMES)
    out.memory.cache = memory.cache or out.memory.cache
    for target, data in (
        (out.memory.usage, memory.usage),
        (out.memory.swap, memory.swap_usage),
        (out.memory.kernel, memory.kernel_usage),
    ):
        target.usage, target.limit = data.usage, data.limit
        target.max, target.failcnt = data.max_usage, data.failcnt
    if not out.memory.total_inactive_file:
        # What `usage - total_inactive_file` makes the working set of; v2 guests name it so.
        out.memory.total_inactive_file = memory.stats.get("inactive_file", 0)
    out.memory_oom_control.oom_kill = memory.stats.get("oom_kill", 0)
    out.memory_oom_control.SetInParent()
    blkio = source.blkio_stats
    out.blkio.SetInParent()  # clients look into it unasked, as runc always has one
    for field in blkio.DESCRIPTOR.fields:
        entries = getattr(out.blkio, field.name)
        for entry in getattr(blkio, field.name)[:_ENTRY_LIMIT]:
            entries.add(op=entry.op, major=entry.major, minor=entry.minor, value=entry.value)
    for size, huge in sorted(source.hugetlb_stats.items())[:_ENTRY_LIMIT]:
        out.hugetlb.add(pagesize=size, usage=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    for network in reply.network_stats[:_ENTRY_LIMIT]:
        _copy_network(out.network.add(), network)
    return out


def _to_v2(reply: agent_pb2.StatsContainerResponse) -> cgroups_v2_pb2.Metrics:
    source = reply.cgroup_stats
    out = cgroups_v2_pb2.Metrics()
    out.pids.current = source.pids_stats.current
    out.pids.limit = source.pids_stats.limit
    usage = source.cpu_stats.cpu_usage
    out.cpu.usage_usec = usage.total_usage // 1000
    out.cpu.user_usec = usage.usage_in_usermode // 1000
    out.cpu.system_usec = usage.usage_in_kernelmode // 1000
    throttling = source.cpu_stats.throttling_data
    out.cpu.nr_periods = throttling.periods
    out.cpu.nr_throttled = throttling.throttled_periods
    out.cpu.throttled_usec = throttling.throttled_time // 1000
    memory = source.memory_stats
    _set_known(out.memory, memory.stats, _V2_MEMORY_FIELDS, {})
    out.memory.usage, out.memory.usage_limit = memory.usage.usage, memory.usage.limit
    out.memory.max_usage = memory.usage.max_usage
    out.memory.swap_usage, out.memory.swap_limit = memory.swap_usage.usage, memory.swap_usage.limit
    out.memory_events.oom = memory.stats.get("oom", 0)
    out.memory_events.oom_kill = memory.stats.get("oom_kill", 0)
    out.memory_events.SetInParent()
    out.io.SetInParent()
    operations: dict[tuple[int, int], cgroups_v2_pb2.IOEntry] = {}
    for entries, names in (
        (source.blkio_stats.io_service_bytes_recursive, {"read": "rbytes", "write": "wbytes"}),
        (source.blkio_stats.io_serviced_recursive, {"read": "rios", "write": "wios"}),
    ):
        for entry in entries[:_ENTRY_LIMIT]:
            name = names.get(entry.op.lower())
            if name is None:
                continue
            key = (entry.major, entry.minor)
            if key not in operations:
                operations[key] = out.io.usage.add(major=entry.major, minor=entry.minor)
            setattr(operations[key], name, entry.value)
    for size, huge in sorted(source.hugetlb_stats.items())[:_ENTRY_LIMIT]:
        out.hugetlb.add(pagesize=size, current=huge.usage, max=huge.max_usage, failcnt=huge.failcnt)
    for network in reply.network_stats[:_ENTRY_LIMIT]:
        _copy_network(out.network.add(), network)
    return out


def _set_known(
    target: cgroups_v1_pb2.MemoryStat | cgroups_v2_pb2.MemoryStat,
    stats: Mapping[str, int],
    known: frozenset[str],
    renamed: Mapping[str, str],
) -> None:
    for name, value in stats.items():
        field = renamed.get(name, name)
        if field in known:
            setattr(target, field, value)


def _copy_network(
    target: cgroups_v1_pb2.NetworkStat | cgroups_v2_pb2.NetworkStat,
    source: agent_pb2.NetworkStats,
) -> None:
    for field in source.DESCRIPTOR.fields:
        setattr(target, field.name, getattr(source, field.name))
