# SPDX-License-Identifier: Apache-2.0
"""How long a start takes in the lab, by phase, beside the lab's own runc.

Run in the lab: ``python3 -m integration.kvmlab.suite.figures [ROUNDS]``; prints JSON.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from integration.kvmlab.suite.system import SystemContainerd, kata_configuration
from integration.lib.containerd import RUNTIME
from integration.lib.images import BUSYBOX_REFERENCE

_MARK = re.compile(r"([a-z-]+)=(\d+\.\d+)")
KINDS = {
    "kvm": "",
    "kvm, vhost-user": '[hypervisor.qemu]\nvsock = "vhost-user"\n',
    "template": "[factory]\nenable_template = true\n",
    "tcg": '[hypervisor.qemu]\naccelerator = "tcg"\n',
}


def seconds(system: SystemContainerd, *words: str) -> float:
    """What a `ctr` command takes."""
    began = time.monotonic()
    system.ctr(*words, timeout=600)
    return time.monotonic() - began


def phases(container_id: str) -> dict[str, float]:
    """The marks that the shim has logged for a container's start."""
    command = ["journalctl", "-u", "containerd", "--no-pager", "-o", "cat"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in log.splitlines() if f"container {container_id} started:" in line)
    return {name: float(value) for name, value in _MARK.findall(line)}


def of_kata(system: SystemContainerd, name: str, change: str, rounds: int) -> dict[str, float]:
    """Medians of one way to start."""
    configuration = kata_configuration(change)
    factory = ["kata-runtime", "--config", str(configuration), "factory"]
    if "enable_template" in change:
        subprocess.run([*factory, "init"], check=True, stdout=subprocess.DEVNULL)
    rows = []
    for number in range(rounds):
        container_id = f"figure-{name.replace(', ', '-')}-{number}"
        flags = ("--runtime", RUNTIME, "--runtime-config-path", str(configuration))
        command = ("run", "-d", *flags, BUSYBOX_REFERENCE, container_id, "sleep", "1000")
        row = {"run": seconds(system, *command)}
        exec_words = ("task", "exec", "--exec-id", "e1", container_id, "true")
        row["exec"] = seconds(system, *exec_words)
        row["end"] = seconds(system, "task", "rm", "-f", container_id)
        system.ctr("container", "rm", container_id)
        rows.append(row | phases(container_id))
    if "enable_template" in change:
        subprocess.run([*factory, "destroy"], check=True, stdout=subprocess.DEVNULL)
    return _medians(rows)


def of_runc(system: SystemContainerd, rounds: int) -> dict[str, float]:
    """Medians of runc."""
    rows = []
    for number in range(rounds):
        container_id = f"figure-runc-{number}"
        command = ("run", "-d", BUSYBOX_REFERENCE, container_id, "sleep", "1000")
        row = {"run": seconds(system, *command)}
        exec_words = ("task", "exec", "--exec-id", "e1", container_id, "true")
        row["exec"] = seconds(system, *exec_words)
        row["end"] = seconds(system, "task", "rm", "-f", container_id)
        system.ctr("container", "rm", container_id)
        rows.append(row)
    return _medians(rows)


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.median(row[name] for row in rows if name in row) for name in names}


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    system = SystemContainerd(Path("/run/containerd/containerd.sock"))
    result = {"runc": of_runc(system, rounds)}
    for name, change in KINDS.items():
        result[name] = of_kata(system, name, change, rounds)
        # Runc beside each, since the machine's speed changes while others use it.
        result[f"runc beside {name}"] = of_runc(system, rounds)
        print(f"{name}: run {result[name]['run']:.2f} s", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
