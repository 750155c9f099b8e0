# SPDX-License-Identifier: Apache-2.0
"""Where on the host a pod's threads are counted and limited (cgroup v1; v2 is the KVM lab's)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.lib.cri import CriNode

pytestmark = [
    pytest.mark.one_edition,
    pytest.mark.skipif(
        Path("/sys/fs/cgroup/cgroup.controllers").exists(), reason="the host has cgroup v2 only"
    ),
]

_QUOTA = {"resources": {"cpu_period": 100000, "cpu_quota": 100000}}


def _threads(pod: str) -> dict[str, dict[str, set[str]]]:
    """``"vmm CPU 0/TCG"`` → controller → the cgroups that threads of that name are in."""
    record = json.loads(Path("/run/vc/sbs", pod, "state.json").read_text())
    found: dict[str, dict[str, set[str]]] = {}
    for process, (pid, *_) in record["processes"].items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            name = f"{process} {(task / 'comm').read_text().strip()}"
            for line in (task / "cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                for controller in controllers.split(","):
                    if controller and "=" not in controller:
                        found.setdefault(name, {}).setdefault(controller, set()).add(path)
    return found


def _run(node: CriNode, handler: str) -> str:
    parent = {"cgroup_parent": f"/{node.mark}pods"}
    pod = node.run_pod(handler=handler, linux=parent)
    node.start_container(pod, "sleep", "1000", linux=_QUOTA)  # brings a vCPU
    return pod


def test_all_of_a_pod_is_in_its_cgroup(node: CriNode) -> None:
    """``sandbox_cgroup_only = true``"""
    pod = _run(node, "kata-alone")
    threads = _threads(pod)
    assert {name.split()[0] for name in threads} == {"shim", "vmm", "virtiofsd"}
    assert sum(" CPU " in name for name in threads) == 2
    for name, places in threads.items():
        assert places.keys() >= {"cpu", "cpuset", "memory", "pids"}
        for controller, paths in places.items():
            assert paths == {f"/{node.mark}pods/kata_{pod}"}, (name, controller)


def test_only_vcpus_are_in_the_pod_s_cgroup(node: CriNode) -> None:
    """``sandbox_cgroup_only = false``: a pod's CPU limit holds back its guest, not its shim."""
    pod = _run(node, "kata")
    threads = _threads(pod)
    assert sum(" CPU " in name for name in threads) == 2
    for name, places in threads.items():
        for controller, paths in places.items():
            of_vcpu = " CPU " in name and controller in ("cpu", "cpuacct", "cpuset")
            wanted = f"/{node.mark}pods/kata_{pod}" if of_vcpu else f"/kata_overhead/{pod}"
            assert paths == {wanted}, (name, controller)
