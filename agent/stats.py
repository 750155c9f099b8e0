# SPDX-License-Identifier: Apache-2.0
"""A container's figures, from cgroup v2 or v1 files, in the shape of Kata's message.

How version 2 is mapped, for those who read it on the other side: times are nanoseconds; the
`stats` map of memory holds memory.stat as is (it has `anon` and `file`, which version 1 lacks:
that tells the two apart); `swap_usage` is swap alone in version 2, memory and swap in version 1;
"max" becomes 2^64-1; io.stat gives the operations `read` and `write`.
"""

from __future__ import annotations

import os

from agent.api import agent_pb2
from ttrpc.errors import Code, RpcError

UNLIMITED = (1 << 64) - 1
CGROUP_ROOT = "/sys/fs/cgroup"

# fields of BlkioStats: the v1 file of the recursive figure, and the throttle layer's if that is not there
_BLKIO_V1 = (
    ("io_service_bytes_recursive", "blkio.io_service_bytes_recursive", "blkio.throttle.io_service_bytes_recursive"),
    ("io_serviced_recursive", "blkio.io_serviced_recursive", "blkio.throttle.io_serviced_recursive"),
    ("io_queued_recursive", "blkio.io_queued_recursive", ""),
    ("io_service_time_recursive", "blkio.io_service_time_recursive", ""),
    ("io_wait_time_recursive", "blkio.io_wait_time_recursive", ""),
    ("io_merged_recursive", "blkio.io_merged_recursive", ""),
    ("io_time_recursive", "blkio.time_recursive", ""),
    ("sectors_recursive", "blkio.sectors_recursive", ""),
)  # fmt: skip


def container_stats(
    cgroup: str, *, root: str = CGROUP_ROOT, proc: str = "/proc"
) -> agent_pb2.StatsContainerResponse:
    """Figures of the container whose cgroup is `cgroup` (relative to each hierarchy's root).

    Raises NOT_FOUND if there is no such cgroup. A figure the kernel doesn't give is 0.
    """
    response = agent_pb2.StatsContainerResponse()
    relative = cgroup.strip("/")
    if os.path.exists(f"{root}/cgroup.controllers"):
        directory = f"{root}/{relative}"
        if not os.path.isdir(directory):
            raise RpcError(Code.NOT_FOUND, f"no cgroup {cgroup!r}")
        _version_2(directory, response.cgroup_stats)
    else:
        if not any(os.path.isdir(f"{root}/{name}/{relative}") for name in _hierarchies(root)):
            raise RpcError(Code.NOT_FOUND, f"no cgroup {cgroup!r}")
        _version_1(root, relative, response.cgroup_stats)
    response.network_stats.extend(network_stats(proc))
    return response


def network_stats(proc: str = "/proc") -> list[agent_pb2.NetworkStats]:
    """The counters of every interface of the namespace the agent lives in."""
    found = []
    for line in _read(f"{proc}/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        values = [int(text) for text in rest.split()]
        if len(values) < 12:
            continue
        found.append(
            agent_pb2.NetworkStats(
                name=name.strip(),
                rx_bytes=values[0],
                rx_packets=values[1],
                rx_errors=values[2],
                rx_dropped=values[3],
                tx_bytes=values[8],
                tx_packets=values[9],
                tx_errors=values[10],
                tx_dropped=values[11],
            )
        )
    return found


def _version_2(directory: str, stats: agent_pb2.CgroupStats) -> None:
    cpu = _table(f"{directory}/cpu.stat")
    usage = stats.cpu_stats.cpu_usage
    usage.total_usage = cpu.get("usage_usec", 0) * 1000
    usage.usage_in_usermode = cpu.get("user_usec", 0) * 1000
    usage.usage_in_kernelmode = cpu.get("system_usec", 0) * 1000
    throttling = stats.cpu_stats.throttling_data
    throttling.periods = cpu.get("nr_periods", 0)
    throttling.throttled_periods = cpu.get("nr_throttled", 0)
    throttling.throttled_time = cpu.get("throttled_usec", 0) * 1000

    memory = stats.memory_stats
    figures = _table(f"{directory}/memory.stat")
    for name, value in figures.items():
        memory.stats[name] = value
    memory.cache = figures.get("file", 0)
    memory.use_hierarchy = True
    memory.usage.usage = _number(f"{directory}/memory.current")
    memory.usage.max_usage = _number(f"{directory}/memory.peak")
    memory.usage.limit = _number(f"{directory}/memory.max")
    events = _table(f"{directory}/memory.events")
    memory.usage.failcnt = events.get("max", 0)
    for name in ("oom", "oom_kill"):  # as beside memory.stat's own
        memory.stats[name] = events.get(name, 0)
    memory.swap_usage.usage = _number(f"{directory}/memory.swap.current")
    memory.swap_usage.max_usage = _number(f"{directory}/memory.swap.peak")
    memory.swap_usage.limit = _number(f"{directory}/memory.swap.max")
    memory.swap_usage.failcnt = _table(f"{directory}/memory.swap.events").get("fail", 0)
    memory.kernel_usage.usage = figures.get("kernel", 0)

    stats.pids_stats.current = _number(f"{directory}/pids.current")
    limit = _number(f"{directory}/pids.max")
    stats.pids_stats.limit = 0 if limit == UNLIMITED else limit

    for line in _read(f"{directory}/io.stat").splitlines():
        device, *pairs = line.split()
        major, colon, minor = device.partition(":")
        if not colon or not major.isdigit() or not minor.isdigit():
            continue
        values = dict(pair.partition("=")[::2] for pair in pairs)
        for field, reads, writes in (
            (stats.blkio_stats.io_service_bytes_recursive, "rbytes", "wbytes"),
            (stats.blkio_stats.io_serviced_recursive, "rios", "wios"),
        ):
            for operation, key in (("read", reads), ("write", writes)):
                field.add(
                    major=int(major), minor=int(minor), op=operation, value=int(values.get(key, 0))
                )

    for name in _names(directory):
        # hugetlb.2MB.current, but not hugetlb.2MB.rsvd.current
        parts = name.split(".")
        if len(parts) == 3 and parts[0] == "hugetlb" and parts[2] == "current":
            page = f"{directory}/hugetlb.{parts[1]}"
            entry = stats.hugetlb_stats[parts[1]]
            entry.usage = _number(f"{page}.current")
            entry.failcnt = _table(f"{page}.events").get("max", 0)


def _version_1(root: str, cgroup: str, stats: agent_pb2.CgroupStats) -> None:
    accounting = f"{root}/cpuacct/{cgroup}"
    usage = stats.cpu_stats.cpu_usage
    usage.total_usage = _number(f"{accounting}/cpuacct.usage")
    usage.percpu_usage.extend(
        int(text) for text in _read(f"{accounting}/cpuacct.usage_percpu").split()
    )
    ticks = _table(f"{accounting}/cpuacct.stat")  # in USER_HZ, 100 a second on every platform
    usage.usage_in_usermode = ticks.get("user", 0) * 10_000_000
    usage.usage_in_kernelmode = ticks.get("system", 0) * 10_000_000
    cpu = _table(f"{root}/cpu/{cgroup}/cpu.stat")
    throttling = stats.cpu_stats.throttling_data
    throttling.periods = cpu.get("nr_periods", 0)
    throttling.throttled_periods = cpu.get("nr_throttled", 0)
    throttling.throttled_time = cpu.get("throttled_time", 0)

    directory = f"{root}/memory/{cgroup}"
    memory = stats.memory_stats
    figures = _table(f"{directory}/memory.stat")
    for name, value in figures.items():
        memory.stats[name] = value
    memory.cache = figures.get("cache", 0)
    memory.use_hierarchy = _number(f"{directory}/memory.use_hierarchy") == 1
    for entry, prefix in (
        (memory.usage, "memory"),
        (memory.swap_usage, "memory.memsw"),
        (memory.kernel_usage, "memory.kmem"),
    ):
        entry.usage = _number(f"{directory}/{prefix}.usage_in_bytes")
        entry.max_usage = _number(f"{directory}/{prefix}.max_usage_in_bytes")
        entry.limit = _number(f"{directory}/{prefix}.limit_in_bytes")
        entry.failcnt = _number(f"{directory}/{prefix}.failcnt")

    directory = f"{root}/pids/{cgroup}"
    stats.pids_stats.current = _number(f"{directory}/pids.current")
    limit = _number(f"{directory}/pids.max")
    stats.pids_stats.limit = 0 if limit == UNLIMITED else limit

    directory = f"{root}/blkio/{cgroup}"
    for field, name, throttled in _BLKIO_V1:
        lines = _read(f"{directory}/{name}") or (throttled and _read(f"{directory}/{throttled}"))
        _blkio_lines(getattr(stats.blkio_stats, field), lines or "")

    directory = f"{root}/hugetlb/{cgroup}"
    for name in _names(directory):
        parts = name.split(".")
        if len(parts) == 3 and parts[2] == "usage_in_bytes":
            page = f"{directory}/hugetlb.{parts[1]}"
            huge = stats.hugetlb_stats[parts[1]]
            huge.usage = _number(f"{page}.usage_in_bytes")
            huge.max_usage = _number(f"{page}.max_usage_in_bytes")
            huge.failcnt = _number(f"{page}.failcnt")


def _blkio_lines(field: object, text: str) -> None:
    """`8:0 Read 4096` or `8:0 4096`; the closing `Total n` names no device."""
    add = getattr(field, "add")  # noqa: B009  (a repeated field has no common static type)
    for line in text.splitlines():
        parts = line.split()
        major, colon, minor = parts[0].partition(":") if parts else ("", "", "")
        if not colon or len(parts) not in (2, 3):
            continue
        operation = parts[1] if len(parts) == 3 else ""
        add(major=int(major), minor=int(minor), op=operation, value=int(parts[-1]))


def _hierarchies(root: str) -> list[str]:
    return _names(root)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _read(path: str) -> str:
    """A small kernel file; empty if the controller, or the kernel, doesn't have it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def _number(path: str) -> int:
    text = _read(path).strip()
    if text == "max":
        return UNLIMITED
    return int(text) if text.isdigit() else 0


def _table(path: str) -> dict[str, int]:
    """`name value` lines as a dictionary."""
    table = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            table[name] = int(value)
    return table
