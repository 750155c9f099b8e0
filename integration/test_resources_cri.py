# SPDX-License-Identifier: Apache-2.0
"""Sizes of pods as a kubelet sets them: at RunPodSandbox, and by UpdateContainerResources."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from integration.lib.cri import CriNode
from integration.lib.kata import wait_until
from shimv2.runtime_cli.management import ask

_MIB = 1 << 20

needs_two_cpus = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the host has one CPU")


def _memory_mib(node: CriNode, container: str) -> int:
    """What the guest's kernel has to give; it keeps a little for itself."""
    return int(node.execute(container, "grep", "MemTotal", "/proc/meminfo").split()[1]) >> 10


def _vmm(pod: str) -> int:
    record = json.loads(Path("/run/vc/sbs", pod, "state.json").read_text())
    return int(record["processes"]["vmm"][0])


def _memory_files_mib(pid: int) -> int:
    """How much of its guest's memory the host has to keep."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:"):
            status = entry.stat()
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values()) >> 20


def _rss_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 >> 20


def _size(pod: str) -> tuple[int, int]:
    """vCPUs and MiB, as the shim tells."""
    said = json.loads(ask(pod, "GET", "/env"))
    return int(said["vcpus"]), int(said["memory_mib"])


def _limits(*, memory: int) -> dict[str, object]:
    """The part of a ContainerConfig."""
    return {"resources": {"memory_limit_in_bytes": memory * _MIB}}


@needs_two_cpus
def test_an_update_makes_the_vm_larger(node: CriNode) -> None:
    pod = node.run_pod()
    container = node.start_container(pod, "sleep", "1000")
    before = _memory_mib(node, container)
    assert node.execute(container, "nproc").strip() == "1"
    node.crictl(
        *("update", "--cpu-quota", "100000", "--cpu-period", "100000"),
        *("--memory", str(256 * _MIB), container),
    )
    assert node.execute(container, "nproc").strip() == "2"
    wait_until(lambda: _memory_mib(node, container) >= before + 240, 10, "the memory is up")
    assert _memory_mib(node, container) <= before + 272
    assert _size(pod) == (2, 2048 + 256)


@needs_two_cpus
def test_a_pod_of_a_fixed_size_has_it_from_the_start(node: CriNode) -> None:
    small = node.run_pod(handler="kata-static")
    before = _memory_mib(node, node.start_container(small, "sleep", "1000"))
    resources = {
        "cpu_period": 100000,
        "cpu_quota": 50000,
        "memory_limit_in_bytes": 256 * _MIB,
    }
    pod = node.run_pod(handler="kata-static", linux={"resources": resources})
    container = node.start_container(pod, "sleep", "1000", linux=_limits(memory=100))
    assert node.execute(container, "nproc").strip() == "2"
    queues = node.execute(container, "ls", "/sys/class/net/eth0/queues").split()
    assert sorted(queues) == ["rx-0", "rx-1", "tx-0", "tx-1"], "one for each vCPU"
    wait_until(lambda: _memory_mib(node, container) >= before + 240, 10, "the memory is up")
    node.crictl("update", "--memory", str(512 * _MIB), container)
    assert before + 240 <= _memory_mib(node, container) <= before + 272


@pytest.mark.one_edition
def test_what_is_freed_goes_back_to_the_host(node: CriNode) -> None:
    """By free page reporting while a container runs, by virtio-mem when less is asked for."""
    pod = node.run_pod(handler="kata-elastic")
    first = node.start_container(pod, "sleep", "1000")
    own = _memory_mib(node, first)
    script = "until [ -e /go ]; do sleep 0.1; done; dd if=/dev/zero bs=150M count=1 |"
    script += " until [ -e /end ]; do sleep 0.1; done; exec sleep 1000"
    greedy = node.start_container(pod, "sh", "-c", script, linux=_limits(memory=400))
    assert own + 384 <= _memory_mib(node, first) <= own + 416
    assert _size(pod) == (1, 2048 + 400)

    vmm = _vmm(pod)
    blocks, resident = _memory_files_mib(vmm), _rss_mib(vmm)
    node.execute(greedy, "touch", "/go")
    wait_until(lambda: _memory_files_mib(vmm) >= blocks + 140, 30, "memory is used")
    assert _rss_mib(vmm) >= resident + 140
    node.execute(greedy, "touch", "/end")
    # The guest reports ranges of 2 MiB only; some of them still have a page in use.
    wait_until(lambda: _memory_files_mib(vmm) <= blocks + 75, 30, "what was freed is the host's")
    assert _rss_mib(vmm) <= resident + 80

    node.crictl("update", "--memory", str(200 * _MIB), greedy)
    wait_until(lambda: _memory_mib(node, first) <= own + 260, 20, "the update takes memory away")
    node.crictl("stop", "-t", "0", greedy)
    node.crictl("rm", greedy)
    wait_until(lambda: _memory_mib(node, first) <= own + 64, 20, "the removal takes the rest")
