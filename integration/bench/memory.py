# SPDX-License-Identifier: Apache-2.0
"""What one sandbox costs in memory: the proportional set size of each of its processes."""

from __future__ import annotations

from pathlib import Path

import psutil

from integration.bench.containers import Workbench, state
from integration.bench.figures import Figure

GOALS = {"shim": "≤ 38", "vmm": "≤ 240", "virtiofsd": ""}


def measure(bench: Workbench, runs: int) -> list[Figure]:
    """PSS in MB of each process of a sandbox with one idle container, its helpers' children too."""
    figures = {name: Figure(f"PSS {name}", "kata", "MB", goal) for name, goal in GOALS.items()}
    for _ in range(runs):
        with bench.container("kata") as container_id:
            bench.execute(container_id, "true")
            for name, (pid, _) in state(container_id)["processes"].items():
                # The VMM and virtiofsd are children of the shim, and counted by themselves.
                size = _own_pss(pid) if name == "shim" else pss(pid)
                figures[name].values.append(size / 1e6)
    return list(figures.values())


def pss(pid: int) -> int:
    """Bytes of a process and its children."""
    process = psutil.Process(pid)
    return sum(_own_pss(p.pid) for p in [process, *process.children(recursive=True)])


def _own_pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no Pss")
