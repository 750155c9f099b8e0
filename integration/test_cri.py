# SPDX-License-Identifier: Apache-2.0
"""Pods as a kubelet asks for them: `crictl` against containerd's CRI plugin."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.lib.cri import CriNode
from integration.lib.crictl import CrictlError
from integration.lib.kata import wait_until

_RUNNING, _EXITED = "CONTAINER_RUNNING", "CONTAINER_EXITED"


def state(node: CriNode, container_id: str) -> str:
    return str(node.inspect(container_id)["status"]["state"])


def test_a_pod_of_two_containers(node: CriNode) -> None:
    pod = node.run_pod()
    one = node.start_container(pod, "sh", "-c", "echo to stdout; echo to stderr >&2; sleep 1000")
    two = node.start_container(pod, "sleep", "1000")
    boots = {node.execute(c, "cat", "/proc/sys/kernel/random/boot_id") for c in (one, two)}
    assert len(boots) == 1, "one VM for both"
    node.execute(one, "sh", "-c", "echo shared > /dev/shm/file")
    assert node.execute(two, "cat", "/dev/shm/file") == "shared\n"
    _namespaces(node, one, two)
    if node.sandboxer == "shim":  # the sum of both, by the Sandbox API
        (stats,) = json.loads(node.crictl("statsp", "-o", "json", "--id", pod))["stats"]
        assert int(stats["linux"]["memory"]["workingSetBytes"]["value"])
        assert "SandboxMetrics failed" not in node.containerd.log.read_text()
    wait_until(lambda: node.logs(one).count("\n") == 2, 5, "both lines are logged")
    assert sorted(node.logs(one).split("\n")) == ["", "to stderr", "to stdout"]
    node.crictl("stop", "-t", "10", one)
    assert state(node, one) == _EXITED
    assert state(node, two) == _RUNNING
    node.crictl("rm", one)
    three = node.start_container(pod, "sleep", "1000")
    assert node.execute(three, "echo", "here") == "here\n"
    node.remove_pod(pod)
    assert node.crictl("pods", "-q") == ""


def _namespaces(node: CriNode, one: str, two: str) -> None:
    """Which are the pod's, and which each container's own."""
    script = "for kind in ipc uts net pid mnt; do readlink /proc/1/ns/$kind; done"
    links = zip(*(node.execute(c, "sh", "-c", script).split() for c in (one, two)), strict=True)
    assert [a == b for a, b in links] == [True, True, True, False, False]


def test_exit_codes_are_told(node: CriNode) -> None:
    pod = node.run_pod()
    container = node.start_container(pod, "sh", "-c", "exit 7")
    wait_until(lambda: state(node, container) == _EXITED, 20, "it has ended")
    assert node.inspect(container)["status"]["exitCode"] == 7
    other = node.start_container(pod, "sleep", "1000")
    with pytest.raises(CrictlError, match=r"exit(ed with)? (code|status)? ?3"):
        node.execute(other, "sh", "-c", "exit 3")
    limit = {"resources": {"memory_limit_in_bytes": 32 << 20}}
    greedy = node.start_container(pod, "tail", "/dev/zero", linux=limit)
    wait_until(lambda: state(node, greedy) == _EXITED, 30, "it was killed")
    wait_until(lambda: node.inspect(greedy)["status"]["reason"] == "OOMKilled", 5, "the reason")
    assert node.inspect(greedy)["status"]["exitCode"] == 137
    assert state(node, other) == _RUNNING


def test_a_container_that_ignores_sigterm_is_killed(node: CriNode) -> None:
    pod = node.run_pod()
    container = node.start_container(
        pod, "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    )
    wait_until(lambda: "ready" in node.logs(container), 10, "it runs")
    begin = time.monotonic()
    node.crictl("stop", "-t", "1", container)
    assert time.monotonic() - begin < 10
    assert node.inspect(container)["status"]["exitCode"] == 137


def test_hostname_and_dns_are_the_pods(node: CriNode) -> None:
    pod = node.run_pod(
        hostname="web-0",
        dns_config={"servers": ["192.0.2.53"], "searches": ["pods.example"]},
    )
    container = node.start_container(pod, "sleep", "1000")
    assert node.execute(container, "hostname") == "web-0\n"
    text = node.execute(container, "cat", "/etc/resolv.conf")
    assert "nameserver 192.0.2.53" in text
    assert "search pods.example" in text


def test_a_pod_is_stopped_with_its_containers_in_any_order(node: CriNode) -> None:
    pod = node.run_pod()
    one, two = (node.start_container(pod, "sleep", "1000") for _ in range(2))
    node.crictl("stop", "-t", "1", two)
    node.crictl("stopp", pod)
    assert state(node, one) == _EXITED
    node.crictl("rm", one)
    node.crictl("rm", two)
    node.crictl("rmp", pod)


def test_a_shared_pid_namespace(node: CriNode) -> None:
    shared = {"security_context": {"namespace_options": {"pid": 0}}}
    pod = node.run_pod(linux=shared)
    one = node.start_container(pod, "sleep", "1234", linux=shared)
    two = node.start_container(pod, "sh", "-c", "(sleep 0.1 &); exec sleep 5678", linux=shared)
    assert "sleep 5678" in node.execute(one, "ps")
    assert "sleep 1234" in node.execute(two, "ps")
    node.crictl("stop", "-t", "1", one)
    assert "sleep 1234" not in node.execute(two, "ps")
    assert "Z" not in node.execute(two, "ps", "-o", "stat")
    own = node.start_container(pod, "sleep", "99")
    assert node.execute(own, "cat", "/proc/1/cmdline") == "sleep\0" + "99\0"


def test_sysctls_of_the_pod(node: CriNode) -> None:
    sysctls = {"net.core.somaxconn": "321", "kernel.shm_rmid_forced": "1"}
    pod = node.run_pod(linux={"sysctls": sysctls})
    container = node.start_container(pod, "sleep", "1000")
    for name, value in sysctls.items():
        path = "/proc/sys/" + name.replace(".", "/")
        assert node.execute(container, "cat", path).strip() == value


def test_ten_containers(node: CriNode) -> None:
    pod = node.run_pod()
    containers = [node.start_container(pod, "sleep", str(1000 + n)) for n in range(10)]
    for number, container in enumerate(containers):
        assert node.execute(container, "cat", "/proc/1/cmdline") == f"sleep\0{1000 + number}\0"
    node.remove_pod(pod)


def test_pods_at_once(node: CriNode) -> None:
    with ThreadPoolExecutor(3) as pool:
        pods = list(pool.map(lambda _: node.run_pod(), range(3)))
        assert len({node.address(pod) for pod in pods}) == 3
        list(pool.map(node.remove_pod, pods))


@pytest.mark.one_edition
def test_who_attaches_may_leave_and_come_back(node: CriNode) -> None:
    script = "while read line; do echo got $line; done"
    container = node.start_container(node.run_pod(), "sh", "-c", script, stdin=True)
    for line in (b"one", b"two"):
        command = [*node.crictl_command(), "attach", "-i", container]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(line + b"\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"got " + line + b"\n"
            client.kill()
    assert state(node, container) == _RUNNING
    assert node.logs(container) == "got one\ngot two\n"


def test_execs_leave_nothing(node: CriNode) -> None:
    pod = node.run_pod()
    container = node.start_container(pod, "sleep", "1000")
    node.execute(container, "true")
    record = json.loads(Path("/run/vc/sbs", pod, "state.json").read_text())
    shim, vmm = (record["processes"][name][0] for name in ("shim", "vmm"))
    before = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (shim, vmm)]
    for _ in range(20):
        node.crictl("exec", "-s", container, "true")
    # A probe that takes too long.
    with pytest.raises(CrictlError, match="DeadlineExceeded"):
        node.crictl("exec", "-s", "--timeout", "1", container, "sleep", "4321")
    assert "4321" not in node.execute(container, "ps")
    wait_until(
        lambda: [len(os.listdir(f"/proc/{pid}/fd")) for pid in (shim, vmm)] == before,
        5,
        "descriptors are as before",
    )
    left = [line for line in node.execute(container, "ps", "-o", "stat").split() if "Z" in line]
    assert not left
