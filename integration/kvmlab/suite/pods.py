# SPDX-License-Identifier: Apache-2.0
"""Pods by CRI under the system's containerd: systemd's cgroup driver, CNI, vhost-net."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
from pathlib import Path

import pytest

from integration.kvmlab.suite.cgroups import cgroup_of
from integration.kvmlab.suite.node import slice_of_pod
from integration.kvmlab.suite.system import command_line, descriptors
from integration.lib import cni
from integration.lib.crictl import Crictl
from integration.lib.host_network import call_in
from integration.lib.kata import wait_until

VHOST_NET = Path("/dev/vhost-net")
_SLICE = "kvmlab-pod1.slice"
_ROOT = Path("/sys/fs/cgroup")


def pid_of(pod: str, name: str) -> int:
    """The pid of a process of a pod's sandbox."""
    record = json.loads(Path("/run/vc/sbs", pod, "state.json").read_text())
    return int(record["processes"][name][0])


def test_a_pod_of_two_containers(node: Crictl) -> None:
    pod = node.run_pod(hostname="web-0", linux=slice_of_pod(_SLICE, "MemoryMax=3G\n"))
    words = command_line(pid_of(pod, "vmm"))
    assert words[words.index("-accel") + 1] == "kvm"
    one = node.start_container(pod, "sh", "-c", "echo to stdout; echo to stderr >&2; sleep 1000")
    two = node.start_container(pod, "sleep", "1000")

    boots = {node.execute(c, "cat", "/proc/sys/kernel/random/boot_id") for c in (one, two)}
    assert len(boots) == 1, "one VM for both"
    assert node.execute(one, "hostname") == "web-0\n"
    wait_until(lambda: node.logs(one).count("\n") == 2, 5, "both lines are logged")

    place = f"/kvmlab.slice/{_SLICE}/cri-containerd-{pod}.scope/sandbox"
    assert cgroup_of(pid_of(pod, "vmm")) == place
    # Whatever systemd does with its units, the pod's limits go on to count.
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    command = ["systemd-run", f"--slice={_SLICE}", "--wait", "--collect", "--quiet", "true"]
    subprocess.run(command, check=True)
    assert cgroup_of(pid_of(pod, "vmm")) == place
    directory = _ROOT / place[1:]
    assert {"cpu", "memory", "pids"} <= set((directory / "cgroup.controllers").read_text().split())
    used = int((_ROOT / "kvmlab.slice" / _SLICE / "memory.current").read_text())
    assert used >= int((directory / "memory.current").read_text()) > 50 << 20

    assert terminal_of(node, one) == "out\r\ntty\r\n24 80\r\n"
    (stats,) = json.loads(node.crictl("stats", "-o", "json", two))["stats"]
    assert int(stats["memory"]["workingSetBytes"]["value"]) > 0
    node.crictl("stop", "-t", "0", one)
    assert node.inspect(one)["status"]["exitCode"] == 137
    assert node.inspect(two)["status"]["state"] == "CONTAINER_RUNNING"
    node.remove_pod(pod)
    assert [path for path in (_ROOT / "kvmlab.slice" / _SLICE).iterdir() if path.is_dir()] == []


def terminal_of(node: Crictl, container: str) -> str:
    """What a shell on a terminal says, of `crictl exec -it` on one of our own."""
    leader, follower = pty.openpty()
    command = [*node.crictl_command(), "exec", "-i", "-t", container, "sh", "-c"]
    script = "echo out; test -t 0 && echo tty; stty size"
    subprocess.run(["stty", "rows", "24", "columns", "80"], stdin=follower, check=True)
    process = subprocess.Popen(
        [*command, script], stdin=follower, stdout=follower, stderr=follower, close_fds=True
    )
    os.close(follower)
    data = b""
    while True:
        try:
            more = os.read(leader, 4096)
        except OSError:  # EIO: nobody has it open any more
            break
        data += more
    os.close(leader)
    assert process.wait(60) == 0, data
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode())


@pytest.mark.parametrize("there", [True, False], ids=["vhost-net", "without"])
def test_bytes_through_the_network(node: Crictl, there: bool) -> None:
    aside = None if there else VHOST_NET.rename(VHOST_NET.with_suffix(".aside"))
    try:
        pod = node.run_pod()
        container = node.start_container(pod, "nc", "-ll", "-p", "7", "-e", "cat")
        assert (str(VHOST_NET) in descriptors(pid_of(pod, "vmm"))) is there
        assert f"default via {cni.GATEWAY_4} dev eth0" in node.execute(container, "ip", "route")
        wait_until(
            lambda: ":7" in node.execute(container, "netstat", "-ltn"), 10, "the server listens"
        )
        sent = os.urandom(4 << 20)
        assert echoed(node.address(pod), sent) == sent
        node.remove_pod(pod)
    finally:
        if aside is not None:
            aside.rename(VHOST_NET)


def echoed(address: str, data: bytes, netns: str = "") -> bytes:
    """What a pod's echo server on port 7 sends back; asked from a network namespace by name."""

    def connect() -> socket.socket:
        return socket.create_connection((address, 7), timeout=60)

    with call_in(Path("/run/netns", netns), connect) if netns else connect() as connection:
        back = bytearray()
        for start in range(0, len(data), 1 << 16):
            piece = data[start : start + (1 << 16)]
            connection.sendall(piece)
            end = len(back) + len(piece)
            while len(back) < end:
                more = connection.recv(1 << 16)
                assert more, f"the connection ended after {len(back)} bytes"
                back += more
        return bytes(back)


def test_an_update_brings_a_vcpu_and_memory(node: Crictl) -> None:
    pod = node.run_pod()
    container = node.start_container(pod, "sleep", "1000")

    def memory_mib() -> int:
        return int(node.execute(container, "grep", "MemTotal", "/proc/meminfo").split()[1]) >> 10

    before = memory_mib()
    assert node.execute(container, "nproc").strip() == "1"
    node.crictl(
        *("update", "--cpu-quota", "100000", "--cpu-period", "100000"),
        *("--memory", str(256 << 20), container),
    )
    assert node.execute(container, "nproc").strip() == "2"
    wait_until(lambda: memory_mib() >= before + 240, 10, "the memory is up")
    node.crictl("update", "--cpu-quota", "-1", container)
    wait_until(lambda: node.execute(container, "nproc").strip() == "1", 15, "the vCPU is gone")
    node.remove_pod(pod)
