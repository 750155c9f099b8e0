# SPDX-License-Identifier: Apache-2.0
"""How long a start takes in the lab, by phase, beside the lab's own runc.

Run in the lab: ``python3 -m integration.kvmlab.suite.figures [ROUNDS [KIND …]]``; prints a table
and what it was made of as JSON.  Each round takes runc's turn before and after every other, since
the machine's speed changes while others use it; a ratio is to the mean of both.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.kvmlab.suite.system import SystemContainerd, kata_configuration
from integration.lib.containerd import RUNTIME
from integration.lib.images import BUSYBOX_REFERENCE

Row = dict[str, float]

_MARK = re.compile(r"([a-z-]+)=(\d+\.\d+)")
KINDS = {
    "cold": "",
    "clone": "[factory]\nenable_template = true\n",
    "cold, vhost-user": '[hypervisor.qemu]\nvsock = "vhost-user"\n',
    "cold, TCG": '[hypervisor.qemu]\naccelerator = "tcg"\n',
}
_USUAL = ("cold", "clone")
RUNC = "runc"


def seconds(system: SystemContainerd, *words: str) -> float:
    """What a `ctr` command takes."""
    began = time.monotonic()
    system.ctr(*words, timeout=600)
    return time.monotonic() - began


def phases(container_id: str) -> Row:
    """The marks that the shim has logged for a container's start."""
    command = ["journalctl", "-u", "containerd", "--no-pager", "-o", "cat"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in log.splitlines() if f"container {container_id} started:" in line)
    return {name: float(value) for name, value in _MARK.findall(line)}


def one(system: SystemContainerd, container_id: str, *flags: str) -> Row:
    """One container's life: the seconds of run, of an exec, of its end."""
    run = ("run", "-d", *flags, BUSYBOX_REFERENCE, container_id, "sleep", "1000")
    row = {"run": seconds(system, *run)}
    row["exec"] = seconds(system, "task", "exec", "--exec-id", "e1", container_id, "true")
    row["end"] = seconds(system, "task", "rm", "-f", container_id)
    system.ctr("container", "rm", container_id)
    return row


@contextmanager
def way(system: SystemContainerd, change: str) -> Iterator[Callable[[str], Row]]:
    """A way to start sandboxes; gives a function that starts and ends one."""
    configuration = kata_configuration(change)
    factory = ["kata-runtime", "--config", str(configuration), "factory"]
    templates = "enable_template" in change
    if templates:
        subprocess.run([*factory, "init"], check=True, stdout=subprocess.DEVNULL)

    def start(container_id: str) -> Row:
        flags = ("--runtime", RUNTIME, "--runtime-config-path", str(configuration))
        return one(system, container_id, *flags) | phases(container_id)

    yield start
    if templates:
        subprocess.run([*factory, "destroy"], check=True, stdout=subprocess.DEVNULL)


def measure(system: SystemContainerd, kind: str, rounds: int) -> list[Row]:
    """A row for each round; the keys `runc …` are what runc took beside it."""
    rows = []
    with way(system, KINDS[kind]) as start:
        start(f"figure-{kind.replace(', ', '-')}-warm")
        before = one(system, "figure-runc-warm")
        for number in range(rounds):
            row = start(f"figure-{kind.replace(', ', '-')}-{number}")
            after = one(system, f"figure-runc-{kind.replace(', ', '-')}-{number}")
            for name, value in after.items():
                beside = (before[name] + value) / 2
                row[f"{RUNC} {name}"] = beside
                row[f"{name} ÷ {RUNC}"] = row[name] / beside
            before = after
            rows.append(row)
            print(f"{kind} {number}: run {row['run']:.2f} s", file=sys.stderr, flush=True)
    return rows


def table(found: dict[str, list[Row]]) -> str:
    """Markdown: median and range of every figure."""
    lines = [f"| | {' | '.join(found)} |", f"| --- |{' --- |' * len(found)}"]
    for name in dict.fromkeys(name for rows in found.values() for row in rows for name in row):
        cells = []
        for rows in found.values():
            values = sorted(row[name] for row in rows if name in row)
            middle = statistics.median(values) if values else 0.0
            cells.append(f"{middle:.2f} ({values[0]:.2f}–{values[-1]:.2f})" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    system = SystemContainerd(Path("/run/containerd/containerd.sock"))
    found = {kind: measure(system, kind, rounds) for kind in sys.argv[2:] or _USUAL}
    print(table(found))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
