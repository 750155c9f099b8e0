# SPDX-License-Identifier: Apache-2.0
"""`kata-runtime` against living sandboxes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from integration.lib.kata import Kata
from shimv2.runtime_cli.console import connect


@pytest.fixture
def kata_runtime(prefix: Path) -> Path:
    return prefix / "bin/kata-runtime"


def test_check_and_env_agree_with_what_runs(kata_runtime: Path, prefix: Path) -> None:
    check = subprocess.run([kata_runtime, "check", "--json"], capture_output=True, check=True)
    assert json.loads(check.stdout)["able"] is True
    env = subprocess.run([kata_runtime, "env", "--json"], capture_output=True, check=True)
    tables = json.loads(env.stdout)
    assert tables["Runtime"]["Path"] == str(prefix / "bin/containerd-shim-kata-v2")
    assert tables["Runtime"]["Config"]["Warnings"] == []


def test_exec_is_a_root_shell_in_the_guest(
    kata: Kata, kata_runtime: Path, with_console: Path
) -> None:
    container = kata.start("sleep", "1000", flags=("--runtime-config-path", with_console))
    script = b"echo sum $((40 + 2)); cat /proc/1/comm; exit 5\n"
    done = subprocess.run(
        [kata_runtime, "exec", container],
        input=script,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"sum 42" in done.stdout
    assert kata.status(container) == "RUNNING"


def test_exec_without_a_console_says_how_to_get_one(kata: Kata, kata_runtime: Path) -> None:
    container = kata.start("sleep", "1000")
    done = subprocess.run(
        [kata_runtime, "exec", container], input=b"", capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert b"debug_console_enabled = true" in done.stderr


@pytest.mark.one_edition
def test_the_agent_s_log_comes_by_the_port_it_was_told(kata: Kata, with_console: Path) -> None:
    drop_in = with_console.parent / "config.d/log.toml"
    drop_in.write_text(
        '[hypervisor.qemu]\nkernel_params = "agent.log_vport=1025"\n'
        "[factory]\nenable_template = false\n"
    )
    container = kata.start("sleep", "1000", flags=("--runtime-config-path", with_console))
    stream, first = connect(Path("/run/vc/vm", container, "hybrid.sock"), 1025)
    with stream:
        stream.settimeout(30)
        while b"\n" not in first:
            first += stream.recv(4096)
        line = json.loads(first.splitlines()[0])
        assert (line["level"], line["source"]) == ("INFO", "agent")
        assert line["msg"] == "listening"


def test_list_shows_a_sandbox_while_it_lives(kata: Kata, kata_runtime: Path) -> None:
    def listed() -> dict[str, dict[str, object]]:
        done = subprocess.run([kata_runtime, "list", "--json"], capture_output=True, check=True)
        return {row["id"]: row for row in json.loads(done.stdout)}

    container = kata.start("sleep", "1000")
    row = listed()[container]
    assert row["alive"] is True
    assert row["pids"] == {
        name: kata.pid_of(container, name) for name in ("shim", "virtiofsd", "vmm")
    }
    kata.remove(container)
    assert container not in listed()
