# SPDX-License-Identifier: Apache-2.0
"""GetMetrics: figures of the agent and the guest as Prometheus text, under Kata's names."""

from __future__ import annotations

import os
import time

from agent import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_STATUS_ITEMS = (
    "hugetlbpages", "nonvoluntary_ctxt_switches", "rssanon", "rssfile", "rssshmem", "vmdata",
    "vmexe", "vmhwm", "vmlck", "vmlib", "vmpeak", "vmpin", "vmpte", "vmrss", "vmsize", "vmstk",
    "vmswap", "voluntary_ctxt_switches",
)  # fmt: skip
_CPU_ITEMS = (
    "user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice",
)  # fmt: skip
_DISK_ITEMS = (
    "reads", "merged", "sectors_read", "time_reading", "writes", "writes_merged",
    "sectors_written", "time_writing", "in_progress", "time_in_progress",
    "weighted_time_in_progress", "discards", "discards_merged", "sectors_discarded",
    "time_discarding", "flushes", "time_flushing",
)  # fmt: skip
_NET_ITEMS = (
    "recv_bytes", "recv_packets", "recv_errs", "recv_drop", "recv_fifo", "recv_frame",
    "recv_compressed", "recv_multicast", "sent_bytes", "sent_packets", "sent_errs", "sent_drop",
    "sent_fifo", "sent_colls", "sent_carrier", "sent_compressed",
)  # fmt: skip
_MEMINFO_NAMES = {
    "Active(anon)": "active_anon",
    "Inactive(anon)": "inactive_anon",
    "Active(file)": "active_file",
    "Inactive(file)": "inactive_file",
    "SReclaimable": "s_reclaimable",
    "SUnreclaim": "s_unreclaim",
    "KReclaimable": "k_reclaimable",
    "NFS_Unstable": "nfs_unstable",
    "WritebackTmp": "writeback_tmp",
    "CommitLimit": "commit_limit",
    "Committed_AS": "committed_as",
    "HugePages_Total": "hugepages_total",
    "HugePages_Free": "hugepages_free",
    "HugePages_Rsvd": "hugepages_rsvd",
    "HugePages_Surp": "hugepages_surp",
    "Hugepagesize": "hugepagesize",
    "DirectMap4k": "direct_map_4k",
    "DirectMap4M": "direct_map_4M",
    "DirectMap2M": "direct_map_2M",
    "DirectMap1G": "direct_map_1G",
}
# Of these a mount has no space of its own worth telling.
_PSEUDO = (
    "proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "mqueue", "debugfs", "tracefs",
    "securityfs", "nsfs", "binfmt_misc", "bpf", "pstore", "fusectl", "autofs",
)  # fmt: skip

_scrapes = 0


class _Text:
    """The exposition format: one HELP and TYPE a family, then its samples."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(
        self,
        name: str,
        help_: str,
        samples: Iterable[tuple[dict[str, str], float]],
        kind: str = "gauge",
    ) -> None:
        rows = []
        for labels, value in samples:
            text = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
            rows.append(f"{name}{{{text}}} {value}" if text else f"{name} {value}")
        if rows:
            self._lines += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}", *rows]

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def guest_metrics(proc: str = "/proc", mountinfo: str = "/proc/self/mountinfo") -> str:
    """All families. A source the kernel lacks leaves its family out."""
    global _scrapes
    _scrapes += 1
    text = _Text()
    _agent(text, proc)
    _guest(text, proc)
    _filesystems(text, mountinfo)
    return str(text)


def _agent(text: _Text, proc: str) -> None:
    text.family("kata_agent_scrape_count", "Scrapes", [({}, _scrapes)], "counter")
    stat = _read(f"{proc}/self/stat").rpartition(")")[2].split()  # from field 3, the state, on
    if len(stat) > 21:
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        times = dict(
            zip(("utime", "stime", "cutime", "cstime"), map(int, stat[11:15]), strict=True)
        )
        size, resident = int(stat[20]), int(stat[21]) * page
        seconds = (times["utime"] + times["stime"]) / tick
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        text.family("kata_agent_threads", "Threads of the agent", [({}, int(stat[17]))])
        text.family("kata_agent_total_time", "CPU time of the agent in seconds", [({}, seconds)])
        text.family("kata_agent_total_vm", "Virtual memory of the agent in bytes", [({}, size)])
        text.family("kata_agent_total_rss", "Resident memory of the agent, bytes", [({}, resident)])
        text.family("kata_agent_proc_stat", "Times of the agent in ticks", _items(times))
        _process(text, proc, seconds, size, resident, boot + int(stat[19]) / tick)
    text.family(
        "kata_agent_proc_status",
        "The agent's /proc status",
        _items(
            {
                name.lower(): value
                for name, value in _fields(f"{proc}/self/status").items()
                if name.lower() in _STATUS_ITEMS
            }
        ),
    )
    text.family("kata_agent_io_stat", "The agent's I/O", _items(_fields(f"{proc}/self/io")))


def _process(
    text: _Text, proc: str, seconds: float, size: int, resident: int, start: float
) -> None:
    """The figures that Prometheus clients give of their own process."""
    limit = 0
    for line in _read(f"{proc}/self/limits").splitlines():
        if line.startswith("Max open files"):
            limit = int(line.split()[3]) if line.split()[3].isdigit() else 0
    try:
        descriptors = len(os.listdir(f"{proc}/self/fd")) - 1  # the one listdir holds
    except OSError:
        descriptors = 0
    prefix = "process_"
    text.family(f"{prefix}cpu_seconds_total", "CPU time in seconds", [({}, seconds)], "counter")
    text.family(f"{prefix}max_fds", "Limit of open descriptors", [({}, limit)])
    text.family(f"{prefix}open_fds", "Open descriptors", [({}, descriptors)])
    text.family(f"{prefix}resident_memory_bytes", "Resident memory", [({}, resident)])
    text.family(f"{prefix}start_time_seconds", "Start, since the epoch", [({}, round(start, 2))])
    text.family(f"{prefix}virtual_memory_bytes", "Virtual memory", [({}, size)])


def _guest(text: _Text, proc: str) -> None:
    load = _read(f"{proc}/loadavg").split()
    if len(load) >= 4:
        loads = zip(("load1", "load5", "load15"), map(float, load[:3]), strict=True)
        text.family("kata_guest_load", "Load averages", _items(dict(loads)))
        current, _, total = load[3].partition("/")
        tasks = {"cur": float(current), "max": float(total)}
        text.family("kata_guest_tasks", "Tasks running and existing", _items(tasks))
    samples = []
    for line in _read(f"{proc}/stat").splitlines():
        name, *values = line.split()
        if name.startswith("cpu"):
            cpu = name[3:] or "total"
            for item, value in zip(_CPU_ITEMS, values, strict=False):
                samples.append(({"cpu": cpu, "item": item}, float(value)))
    text.family("kata_guest_cpu_time", "CPU time in ticks", samples)
    pairs = (line.partition(" ") for line in _read(f"{proc}/vmstat").splitlines())
    figures = {name: float(value) for name, _, value in pairs if value}
    text.family("kata_guest_vm_stat", "Virtual memory", _items(figures))
    memory = {_snake(name): value for name, value in _fields(f"{proc}/meminfo", 1024).items()}
    text.family("kata_guest_meminfo", "Memory in bytes, pages in numbers", _items(memory))
    samples = []
    for line in _read(f"{proc}/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        for item, value in zip(_NET_ITEMS, rest.split(), strict=False):
            samples.append(({"interface": name.strip(), "item": item}, float(value)))
    text.family("kata_guest_netdev_stat", "Interfaces", samples)
    samples = []
    for line in _read(f"{proc}/diskstats").splitlines():
        fields = line.split()
        for item, value in zip(_DISK_ITEMS, fields[3:], strict=False):
            samples.append(({"disk": fields[2], "item": item}, float(value)))
    text.family("kata_guest_diskstat", "Disks", samples)


def _filesystems(text: _Text, mountinfo: str) -> None:
    space: list[tuple[dict[str, str], float]] = []
    inodes: list[tuple[dict[str, str], float]] = []
    try:
        # of several mounts on one point only the last can be reached
        table = {point: (device, fstype) for device, point, fstype in mounts.mounted(mountinfo)}
    except OSError:
        return
    for point, (device, fstype) in table.items():
        # virtio-fs is the host's: its figures tell nothing of the guest, and asking may hang
        if fstype in _PSEUDO or fstype in ("virtiofs", "9p"):
            continue
        try:
            figures = os.statvfs(point)
        except OSError:
            continue
        labels = {"mount": point, "device": device}
        unit = figures.f_frsize
        for item, value in (
            ("total", figures.f_blocks),
            ("used", figures.f_blocks - figures.f_bfree),
            ("available", figures.f_bavail),
        ):
            space.append(({**labels, "item": item}, value * unit))
        for item, value in (
            ("total", figures.f_files),
            ("used", figures.f_files - figures.f_ffree),
            ("available", figures.f_favail),
        ):
            inodes.append(({**labels, "item": item}, value))
    text.family("kata_guest_filesystem_bytes", "Space of guest mounts", space)
    text.family("kata_guest_filesystem_inodes", "Inodes of guest mounts", inodes)


def _items(values: dict[str, float] | dict[str, int]) -> list[tuple[dict[str, str], float]]:
    return [({"item": name}, value) for name, value in values.items()]


def _fields(path: str, kilobyte: int = 1) -> dict[str, int]:
    """`Name:  123 kB` lines, a kB counted as `kilobyte`; what has no number is left out."""
    found = {}
    for line in _read(path).splitlines():
        name, _, rest = line.partition(":")
        value = rest.split()
        if value and value[0].isdigit():
            found[name] = int(value[0]) * (kilobyte if value[-1] == "kB" else 1)
    return found


def _snake(name: str) -> str:
    """`MemTotal` as `mem_total`; the odd ones by table."""
    known = _MEMINFO_NAMES.get(name)
    if known is not None:
        return known
    letters = []
    previous = "_"
    for character in name:
        if character in "()":
            continue
        if character.isupper() and previous != "_" and not previous.isupper():
            letters.append("_")
        letters.append(character.lower())
        previous = character
    return "".join(letters)


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
