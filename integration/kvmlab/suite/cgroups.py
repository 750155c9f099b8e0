# SPDX-License-Identifier: Apache-2.0
"""A host whose cgroups are version 2 only, by both cgroup drivers that an engine can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.kvmlab.suite.system import kata_configuration
from integration.lib.kata import Kata

ROOT = Path("/sys/fs/cgroup")

PATHS = {
    "cgroupfs": ("/pods/{id}", "/pods/kata_{id}"),
    "systemd": (
        "kvmlab-pods.slice:cri:{id}",
        "/kvmlab.slice/kvmlab-pods.slice/cri-{id}.scope/sandbox",
    ),
}


@pytest.mark.parametrize("sandbox_only", [True, False], ids=["sandbox-only", "overhead"])
@pytest.mark.parametrize("driver", PATHS)
def test_the_vm_lives_in_the_pod_s_cgroup(kata: Kata, driver: str, sandbox_only: bool) -> None:
    wanted, expected = PATHS[driver]
    configuration = kata_configuration(
        f"[runtime]\nsandbox_cgroup_only = {str(sandbox_only).lower()}\n"
    )
    container_id = kata.new_id()
    kata.ctr(
        *("run", "-d", "--runtime", "io.containerd.kata.v2"),
        *("--runtime-config-path", configuration),
        *("--cgroup", wanted.format(id=container_id)),
        *("localhost/busybox:latest", container_id, "sleep", "1000"),
    )
    expected = expected.format(id=container_id)
    assert cgroup_of(kata.pid_of(container_id, "vmm")) == expected
    shim = cgroup_of(kata.pid_of(container_id, "shim"))
    assert shim == (expected if sandbox_only else f"/kata_overhead/{container_id}")
    assert "memory" in (ROOT / expected.lstrip("/") / "cgroup.controllers").read_text()
    assert "memory" in kata.ctr("task", "metrics", container_id).stdout.lower()
    kata.remove(container_id)
    assert not (ROOT / expected.lstrip("/")).exists()


def cgroup_of(pid: int) -> str:
    """A process's cgroup of version 2."""
    (line,) = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return line.removeprefix("0::")
