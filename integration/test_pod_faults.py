# SPDX-License-Identifier: Apache-2.0
"""When things break under a pod of three containers with network: each has an exit event, the
pod can be stopped and removed, and nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.lib.cri import CriNode
from integration.lib.kata import EventLog, wait_until

pytestmark = pytest.mark.one_edition

_SOON = 3.0  # seconds: 2 by design (DESIGN decision 12), and what two crictl take
_HUNG = 32.0
_LOST, _KILLED = 255, 137


@pytest.fixture
def events(node: CriNode) -> Iterator[EventLog]:
    log = EventLog(node.containerd)
    yield log
    log.close()


@dataclass
class Pod:
    """A pod of three, one of them with an exec that runs."""

    node: CriNode
    id: str
    members: list[str]

    def state(self) -> list[str]:
        return [str(self.node.inspect(m)["status"]["state"]) for m in self.members]

    def exit_codes(self) -> set[int]:
        return {int(self.node.inspect(m)["status"]["exitCode"]) for m in self.members}

    def pid(self, name: str) -> int:
        record = json.loads(Path("/run/vc/sbs", self.id, "state.json").read_text())
        return int(record["processes"][name][0])

    def traces(self) -> list[str]:
        """Taps and tc filters in its network namespace."""
        inside = ["nsenter", f"--net={self.namespace}"]

        def ask(*command: str) -> list[dict[str, str]]:
            done = subprocess.run([*inside, *command], check=True, capture_output=True)
            found: list[dict[str, str]] = json.loads(done.stdout or b"[]")
            return found

        links = [link["ifname"] for link in ask("ip", "-json", "link")]
        queues = [q["kind"] for q in ask("tc", "-json", "qdisc", "show")]
        return [n for n in links if n.startswith("tap")] + [k for k in queues if k == "ingress"]

    def __post_init__(self) -> None:
        self.namespace = self.node.netns(self.id)
        assert len(self.traces()) == 3, "a tap, and a queue at each end"


def run(node: CriNode, handler: str = "kata", **more: object) -> Pod:
    """`more` are fields of the pod's configuration and of its containers'."""
    pod = node.run_pod(handler=handler, **more)
    return Pod(node, pod, [node.start_container(pod, "sleep", "1000", **more) for _ in range(3)])


def ends(pod: Pod, events: EventLog, limit: float = _SOON) -> None:
    """All of it has ended, is told, and can be removed."""
    wait_until(lambda: pod.state() == ["CONTAINER_EXITED"] * 3, limit, "the containers ended")
    assert pod.exit_codes() <= {_LOST, _KILLED}
    # With the Sandbox API the pod itself is no task; containerd waits for its end by WaitSandbox.
    tasks = pod.members if pod.node.sandboxer == "shim" else [*pod.members, pod.id]
    for member in tasks:
        wait_until(
            lambda m=member: "/tasks/exit" in events.topics(m), _SOON, f"an exit event of {member}"
        )
    wait_until(lambda: not pod.traces(), _SOON, "no tap and no filter is left in the namespace")
    # containerd answers a StopPodSandbox before it has noted itself that the sandbox is gone.
    wait_until(
        lambda: pod.node.inspect_pod(pod.id)["status"]["state"] == "SANDBOX_NOTREADY",
        _SOON,
        "the pod is not ready",
    )
    pod.node.remove_pod(pod.id)
    assert pod.node.crictl("pods", "-q") == ""
    assert pod.node.crictl("ps", "-aq") == ""


@pytest.mark.parametrize("name", ["vmm", "virtiofsd"])
def test_a_lost_helper(node: CriNode, events: EventLog, name: str) -> None:
    pod = run(node)
    os.kill(pod.pid(name), signal.SIGKILL)
    ends(pod, events)


def test_a_killed_shim(node: CriNode, events: EventLog) -> None:
    pod = run(node)
    os.kill(pod.pid("shim"), signal.SIGKILL)
    ends(pod, events, _SOON + 2)


def test_a_panic_of_the_guest(node: CriNode, events: EventLog) -> None:
    privileged = {"security_context": {"privileged": True}}
    pod = run(node, linux=privileged)
    with pytest.raises(Exception, match="exec"):
        node.execute(pod.members[2], "sh", "-c", "echo c > /proc/sysrq-trigger", timeout=20)
    ends(pod, events)


def test_a_crash_of_the_agent(node: CriNode, events: EventLog, prefix: Path) -> None:
    """PID 1 takes no signal from inside, so its program is overwritten with zeros."""
    pod = run(node, "kata-debug")
    script = """
        set -- $(grep r-xp /proc/1/maps | grep python | head -n 1 | tr - ' ')
        dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((0x$1 / 4096)) \\
            count=$(((0x$2 - 0x$1) / 4096)) conv=notrunc
    """
    subprocess.run(
        [prefix / "bin/kata-runtime", "exec", pod.id],
        input=script.encode(),
        capture_output=True,
        timeout=30,
        check=False,
    )
    ends(pod, events, _SOON + 2)


def test_a_guest_that_hangs(node: CriNode, events: EventLog) -> None:
    pod = run(node, "kata-debug")
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(f"/run/vc/vm/{pod.id}/extra-monitor.sock")
        for command in ("qmp_capabilities", "stop"):
            monitor.sendall(json.dumps({"execute": command}).encode())
        answers = monitor.makefile()
        while '"STOP"' not in answers.readline():
            pass
    ends(pod, events, _HUNG)


@pytest.mark.parametrize("kill", [False, True], ids=["restarted", "killed"])
def test_containerd_comes_back(node: CriNode, kill: bool) -> None:
    pod = run(node)
    daemon = node.containerd
    daemon.stop(kill=kill)
    daemon.start()
    node.wait_ready()
    assert pod.state() == ["CONTAINER_RUNNING"] * 3
    for member in pod.members:
        assert node.execute(member, "echo", "here") == "here\n"
    assert node.start_container(pod.id, "sleep", "1000")
    node.remove_pod(pod.id)


def test_what_ends_while_containerd_is_away(node: CriNode) -> None:
    """One pod loses its VM, another its shim."""
    pods = run(node), run(node)
    pids = pods[0].pid("vmm"), pods[1].pid("shim")
    node.containerd.stop()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    node.containerd.start()
    node.wait_ready()
    for pod in pods:
        wait_until(
            lambda pod=pod: pod.state() == ["CONTAINER_EXITED"] * 3, 10, "the containers ended"
        )
        assert pod.exit_codes() <= {_LOST, _KILLED}
        node.remove_pod(pod.id)
