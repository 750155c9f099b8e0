# SPDX-License-Identifier: Apache-2.0
"""The short part: a cold start on KVM with the kernel's vhost-vsock, and all that it leaves is
nothing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from integration.kvmlab.suite.system import (
    VHOST_VSOCK,
    command_line,
    descriptors,
    kata_configuration,
    modules,
)
from integration.lib.kata import Kata, wait_until
from integration.lib.leftovers import left_by


def test_the_check_finds_kvm_and_vhost_vsock() -> None:
    done = subprocess.run(["kata-runtime", "check", "--json"], capture_output=True, check=True)
    answer = json.loads(done.stdout)
    states = {row["name"]: row["state"] for row in answer["findings"]}
    assert answer["able"] is True
    assert states["KVM"] == states["vhost-vsock"] == states["cgroups"] == "ok"


def test_a_cold_start_exec_and_kill(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    vmm = kata.pid_of(container_id, "vmm")
    words = command_line(vmm)
    assert words[words.index("-accel") + 1] == "kvm"
    assert words[words.index("-cpu") + 1].split(",")[0] == "host"
    assert any('"vhost-vsock-pci"' in word for word in words)
    assert VHOST_VSOCK in descriptors(vmm)
    done = kata.execute(container_id, "sh", "-c", "echo hello; uname -r; exit 7", check=False)
    greeting, kernel = done.stdout.split()
    assert (greeting, done.returncode) == ("hello", 7)
    assert kernel != os.uname().release
    kata.ctr("task", "kill", "-s", "SIGKILL", container_id)
    wait_until(lambda: kata.status(container_id) == "STOPPED", 10, "the container is stopped")
    assert kata.delete(container_id) == 137
    kata.ctr("container", "rm", container_id)
    left = left_by(kata.mark)
    assert not left, f"left behind: {left}"
    # The kernel keeps a closed socket for 8 s if the guest has not answered its end.
    wait_until(lambda: modules()["vhost_vsock"] == 0, 15, "nobody holds /dev/vhost-vsock")
    assert not Path(f"/proc/{vmm}").exists()


def test_what_goes_in_comes_out(kata: Kata) -> None:
    data = os.urandom(2 << 20).hex().encode()
    done = kata.run("sh", "-c", "cat; exit 3", input=data, check=False)
    assert done.returncode == 3
    assert done.stdout.encode() == data


def test_a_start_from_a_template(kata: Kata) -> None:
    configuration = kata_configuration("[factory]\nenable_template = true\n")
    subprocess.run(
        ["kata-runtime", "--config", configuration, "factory", "init"], check=True, timeout=300
    )
    try:
        container_id = kata.start(
            "sleep", "1000", flags=("--runtime-config-path", str(configuration))
        )
        assert "-incoming" in command_line(kata.pid_of(container_id, "vmm"))
        assert kata.execute(container_id, "echo", "hello").stdout == "hello\n"
        kata.remove(container_id)
    finally:
        subprocess.run(
            ["kata-runtime", "--config", configuration, "factory", "destroy"], check=True
        )
