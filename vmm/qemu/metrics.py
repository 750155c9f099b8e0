# SPDX-License-Identifier: Apache-2.0
"""Figures about a running QEMU."""

from __future__ import annotations

import os
from pathlib import Path

from vmm.errors import VmmGoneError
from vmm.hypervisor import VmMetrics
from vmm.qemu.qmp_client import QmpClient


async def read(qmp: QmpClient, pid: int, vcpus: int, memory_mib: int) -> VmMetrics:
    """vCPU threads by QMP, the rest from /proc (proc(5): stat, statm)."""
    cpus = await qmp.execute("query-cpus-fast")
    threads = {int(cpu["cpu-index"]): int(cpu["thread-id"]) for cpu in cpus}
    try:
        # The command in parentheses may hold blanks: fields are counted after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError as error:
        raise VmmGoneError("QEMU ended") from error
    ticks = int(fields[11]) + int(fields[12])  # utime, stime
    return VmMetrics(
        pids=(pid,),
        vcpu_threads=threads,
        vcpus=vcpus,
        memory_mib=memory_mib,
        rss_bytes=resident * os.sysconf("SC_PAGE_SIZE"),
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
    )
