# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of a process, under the names of Kata's items."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

STATUS_ITEMS = frozenset(
    (
        "hugetlbpages", "nonvoluntary_ctxt_switches", "rssanon", "rssfile", "rssshmem", "vmdata",
        "vmexe", "vmhwm", "vmlck", "vmlib", "vmpeak", "vmpin", "vmpte", "vmrss", "vmsize", "vmstk",
        "vmswap", "voluntary_ctxt_switches",
    )
)  # fmt: skip
NET_ITEMS = (
    "recv_bytes", "recv_packets", "recv_errs", "recv_drop", "recv_fifo", "recv_frame",
    "recv_compressed", "recv_multicast", "sent_bytes", "sent_packets", "sent_errs", "sent_drop",
    "sent_fifo", "sent_colls", "sent_carrier", "sent_compressed",
)  # fmt: skip
_TIMES = ("utime", "stime", "cutime", "cstime")
_DESCENDANTS = 64  # virtiofsd has one child


@dataclass(slots=True)
class Process:
    """Figures of a process, or the sums of several.

    Attributes:
        status: bytes, and numbers of context switches (proc(5): status).
        times: ticks of `os.sysconf("SC_CLK_TCK")`.
        io: proc(5): io.
        pss: bytes.
    """

    threads: int = 0
    fds: int = 0
    status: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    io: dict[str, int] = field(default_factory=dict)
    pss: int = 0

    @property
    def cpu_seconds(self) -> float:
        """What its own threads used."""
        ticks = self.times.get("utime", 0) + self.times.get("stime", 0)
        return ticks / os.sysconf("SC_CLK_TCK")


def read(pids: Iterable[int]) -> Process:
    """The sum over `pids`; one that has ended counts nothing."""
    total = Process()
    for pid in pids:
        try:
            _add(total, pid)
        except OSError:
            continue
    return total


def _add(total: Process, pid: int) -> None:
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # from field 3, the state, on
    status = _fields(f"/proc/{pid}/status")
    io = _fields(f"/proc/{pid}/io")
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    pss = _fields(f"/proc/{pid}/smaps_rollup").get("Pss", 0)
    total.threads += int(fields[17])
    total.fds += fds
    total.pss += pss
    for into, values in (
        (total.times, zip(_TIMES, map(int, fields[11:15]), strict=True)),
        (total.status, ((k.lower(), v) for k, v in status.items() if k.lower() in STATUS_ITEMS)),
        (total.io, ((name.replace("_", ""), value) for name, value in io.items())),
    ):
        for name, value in values:
            into[name] = into.get(name, 0) + value


def with_descendants(pid: int) -> list[int]:
    """A process and what it started, if it still runs."""
    found = [pid]
    for parent in found:
        try:
            children = _text(f"/proc/{parent}/task/{parent}/children").split()
        except OSError:
            continue
        found += map(int, children)
        if len(found) > _DESCENDANTS:
            break
    return found


def interfaces(pid: int) -> list[tuple[str, dict[str, int]]]:
    """The counters of every link in the network namespace of `pid`."""
    try:
        lines = _text(f"/proc/{pid}/net/dev").splitlines()[2:]
    except OSError:
        return []
    found = []
    for line in lines:
        name, _, rest = line.partition(":")
        values = map(int, rest.split())
        found.append((name.strip(), dict(zip(NET_ITEMS, values, strict=False))))
    return found


def _fields(path: str) -> dict[str, int]:
    """`Name:  123 kB` lines, in bytes; what has no number is left out."""
    found = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        value = rest.split()
        if value and value[0].isdigit():
            found[name] = int(value[0]) * (1024 if value[-1] == "kB" else 1)
    return found


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
