# SPDX-License-Identifier: Apache-2.0
"""A sandbox's management socket, by `kata-runtime` and by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from agent.version import VERSION as AGENT_VERSION
from integration.lib.kata import Kata
from shimv2.metrics.tests.test_documentation import documented
from shimv2.runtime_cli.management import ManagementError, ask
from shimv2.version import VERSION as RUNTIME_VERSION

pytestmark = pytest.mark.one_edition

RULES = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 81 -j DROP\nCOMMIT\n"


def test_management(kata: Kata, prefix: Path) -> None:
    """One VM for all that is asked by the socket."""
    container = kata.start("sleep", "1000")
    path = Path("/run/vc/sbs", container, "shim-monitor.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    env = json.loads(ask(container, "GET", "/env"))
    assert env["runtime"] == RUNTIME_VERSION
    assert env["agent"] == AGENT_VERSION
    assert env["pid"] == str(kata.pid_of(container, "vmm"))
    _agent_url(container)
    _iptables(container, prefix / "bin/kata-runtime")
    _metrics(kata, container, prefix / "bin/kata-runtime")
    _monitor(container, prefix / "bin/kata-monitor")
    _log(kata, container)
    _hung_guest(kata, container)
    for method, target, said in (
        ("GET", "/nothing", "there is no '/nothing' here"),
        ("DELETE", "/iptables", "takes GET, PUT"),
        ("PUT", "/iptables", "no rules"),
    ):
        with pytest.raises(ManagementError, match=said):
            ask(container, method, target)


def _hung_guest(kata: Kata, container: str) -> None:
    """Its own figures are missing then, and the host's are there within seconds."""
    vmm = kata.pid_of(container, "vmm")
    os.kill(vmm, signal.SIGSTOP)
    try:
        began = time.monotonic()
        text = ask(container, "GET", "/metrics").decode()
        assert time.monotonic() - began < 5
    finally:
        os.kill(vmm, signal.SIGCONT)
    assert "kata_hypervisor_threads " in text
    assert "kata_guest_" not in text
    assert "kata_guest_load{" in ask(container, "GET", "/metrics").decode()


def _log(kata: Kata, container: str) -> None:
    """containerd runs at debug, so the shim does; the console brings the agent's lines."""
    lines = kata.containerd.last_log_lines(10_000).splitlines()
    of_sandbox = [line for line in lines if f'sandbox="{container}" namespace="default"' in line]
    (started,) = [line for line in of_sandbox if f"container {container} started" in line]
    assert started.endswith(f'container="{container}" source=sandbox')
    agent = [line for line in of_sandbox if 'msg="console: agent ' in line]
    assert agent
    assert all("level=debug" in line for line in agent)


def _agent_url(container: str) -> None:
    url = ask(container, "GET", "/agent-url").decode()
    kind, _, rest = url.partition("://")
    assert kind == "hvsock"
    path, _, port = rest.rpartition(":")
    with socket.socket(socket.AF_UNIX) as hybrid:
        hybrid.connect(path)
        hybrid.sendall(f"CONNECT {port}\n".encode())
        assert hybrid.recv(64).startswith(b"OK ")


def _metrics(kata: Kata, container: str, kata_runtime: Path) -> None:
    def scrape() -> dict[str, Metric]:
        text = subprocess.run(
            [kata_runtime, "metrics", container], capture_output=True, check=True, text=True
        ).stdout
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(families: dict[str, Metric], family: str, **labels: str) -> float:
        found = [s.value for s in families[family].samples if s.labels == labels]
        assert len(found) == 1, (family, labels)
        return found[0]

    first = scrape()
    kata.execute(container, "sh", "-c", "head -c 3000000 /dev/zero")
    second = scrape()
    for role, process in (("shim", "shim"), ("hypervisor", "vmm")):
        status = Path(f"/proc/{kata.pid_of(container, process)}/status").read_text()
        threads = int(status.partition("Threads:")[2].split()[0])
        assert abs(value(second, f"kata_{role}_threads") - threads) <= 2
        assert value(second, f"kata_{role}_proc_status", item="vmrss") > 10 << 20
    assert value(second, "kata_virtiofsd_fds") > 5
    assert value(second, "kata_guest_meminfo", item="mem_total") > 100 << 20
    assert value(second, "kata_hypervisor_netdev", interface="lo", item="recv_bytes") == 0
    assert "kata_shim_pod_overhead_cpu" not in first  # it is that between two scrapes
    assert 0 <= value(second, "kata_shim_pod_overhead_cpu") <= 250
    assert value(second, "kata_shim_pod_overhead_memory_in_bytes") > 50 << 20
    moved = [value(f, "kata_shim_vsock_bytes", direction="from_guest") for f in (first, second)]
    assert 3_000_000 <= moved[1] - moved[0] < 3_200_000
    assert value(second, "kata_agent_scrape_count") == value(first, "kata_agent_scrape_count") + 1
    calls = second["kata_shim_rpc_durations_histogram_milliseconds"]
    counts = {s.labels["action"]: s.value for s in calls.samples if s.name.endswith("_count")}
    assert counts["create"] == counts["exec"] == 1
    assert counts["start"] == 2
    agent = second["kata_shim_agent_rpc_durations_histogram_milliseconds"]
    assert "grpc.CreateContainerRequest" in {s.labels["action"] for s in agent.samples}
    phases = second["kata_shim_boot_phase_milliseconds"]
    assert {"shim", "agent", "create"} <= {s.labels["phase"] for s in phases.samples}


def _monitor(container: str, kata_monitor: Path) -> None:
    with subprocess.Popen(
        [kata_monitor, "--listen-address", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True
    ) as monitor:
        try:
            assert monitor.stderr is not None
            port = monitor.stderr.readline().split()[-1]

            def get(target: str) -> str:
                url = f"http://127.0.0.1:{port}{target}"
                with urllib.request.urlopen(url, timeout=20) as answer:
                    return str(answer.read().decode())

            assert container in get("/sandboxes").split()
            assert get(f"/agent-url?sandbox={container}").startswith("hvsock://")
            assert "kata_guest_load{" in get(f"/metrics?sandbox={container}")
            text = get("/metrics")
            kinds = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", text))
            assert kinds == documented()
            families = {f.name: f for f in text_string_to_metric_families(text)}
            for name in ("kata_shim_threads", "kata_guest_load", "kata_monitor_shim_up"):
                labels = [s.labels["sandbox_id"] for s in families[name].samples]
                assert container in labels, name
            starts = families["kata_shim_boot_durations_histogram_milliseconds"].samples
            assert sum(s.value for s in starts if s.name.endswith("_count")) >= 1
        finally:
            monitor.terminate()
    assert monitor.returncode == 0


def _iptables(container: str, kata_runtime: Path) -> None:
    command = [kata_runtime, "iptables"]
    subprocess.run(
        [*command, "set", "--sandbox-id", container, "-"], input=RULES.encode(), check=True
    )
    for flags, there in (((), True), (("--v6",), False)):
        shown = subprocess.run(
            [*command, "get", "--sandbox-id", container, *flags],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        assert ("--dport 81 -j DROP" in shown) is there
    wrong = subprocess.run(
        [*command, "set", "--sandbox-id", container, "-"],
        input=b"nonsense\n",
        capture_output=True,
        check=False,
    )
    assert wrong.returncode == 1
    assert b"iptables" in wrong.stderr
