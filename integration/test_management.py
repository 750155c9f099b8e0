# SPDX-License-Identifier: Apache-2.0
"""A sandbox's management socket, by `kata-runtime` and by hand."""

from __future__ import annotations

import socket
import stat
import subprocess
from pathlib import Path

import pytest

from integration.lib.kata import Kata
from shimv2.runtime_cli.management import ManagementError, ask

pytestmark = pytest.mark.one_edition

RULES = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 81 -j DROP\nCOMMIT\n"


def test_management(kata: Kata, prefix: Path) -> None:
    """One VM for all that is asked by the socket."""
    container = kata.start("sleep", "1000")
    path = Path("/run/vc/sbs", container, "shim-monitor.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _agent_url(container)
    _iptables(container, prefix / "bin/kata-runtime")
    for method, target, said in (
        ("GET", "/nothing", "there is no '/nothing' here"),
        ("DELETE", "/iptables", "takes GET, PUT"),
        ("PUT", "/iptables", "no rules"),
    ):
        with pytest.raises(ManagementError, match=said):
            ask(container, method, target)


def _agent_url(container: str) -> None:
    url = ask(container, "GET", "/agent-url").decode()
    kind, _, rest = url.partition("://")
    assert kind == "hvsock"
    path, _, port = rest.rpartition(":")
    with socket.socket(socket.AF_UNIX) as hybrid:
        hybrid.connect(path)
        hybrid.sendall(f"CONNECT {port}\n".encode())
        assert hybrid.recv(64).startswith(b"OK ")


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
