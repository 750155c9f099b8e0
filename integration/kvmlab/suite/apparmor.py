# SPDX-License-Identifier: Apache-2.0
"""A host with AppArmor: profiles of a spec are the host's, those of our processes hold."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.kvmlab.suite.pods import pid_of
from integration.lib.crictl import Crictl
from integration.lib.kata import Kata

_PARSER = "apparmor_parser"
# Of a node whose administrator confines the engine: what it starts inherits the profile.
_CONFINED = """
#include <tunables/global>
profile kvmlab-engine flags=(attach_disconnected,mediate_deleted) {
  #include <abstractions/base>
  capability, network, mount, umount, pivot_root, ptrace, signal, unix, dbus, file,
  deny /etc/shadow r,
}
"""


@pytest.fixture(autouse=True)
def _enabled() -> None:
    assert Path("/sys/module/apparmor/parameters/enabled").read_text() == "Y\n"


def label_of(pid: int | str) -> str:
    """The profile of a process."""
    return Path(f"/proc/{pid}/attr/current").read_text().strip()


@pytest.fixture
def profile(tmp_path: Path) -> Iterator[str]:
    """A loaded profile in enforce mode."""
    file = tmp_path / "profile"
    file.write_text(_CONFINED)
    subprocess.run([_PARSER, "--add", "--skip-cache", file], check=True)
    yield "kvmlab-engine"
    subprocess.run([_PARSER, "--remove", file], check=True)


def test_a_container_with_the_default_profile(node: Crictl) -> None:
    """CRI puts one into each spec of a host with AppArmor; the guest's kernel has none."""
    pod = node.run_pod()
    container = node.start_container(pod, "sleep", "1000")
    spec = node.inspect(container)["info"]["runtimeSpec"]
    assert spec["process"]["apparmorProfile"] == "cri-containerd.apparmor.d"
    assert node.execute(container, "echo", "hello") == "hello\n"
    for name in ("shim", "vmm", "virtiofsd"):
        assert label_of(pid_of(pod, name)) == "unconfined"
    node.remove_pod(pod)


def test_a_profile_that_nobody_has_loaded(kata: Kata) -> None:
    done = kata.run("echo", "hello", flags=("--apparmor-profile", "kvmlab-missing"))
    assert done.stdout == "hello\n"


def test_the_sandbox_of_a_confined_engine(kata: Kata, profile: str) -> None:
    daemon = kata.containerd
    drop_in = Path("/run/systemd/system/containerd.service.d/apparmor.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(f"[Service]\nAppArmorProfile={profile}\n")
    try:
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        daemon.stop()
        daemon.start()
        container_id = kata.start("sleep", "1000")
        for name in ("shim", "vmm", "virtiofsd"):
            assert label_of(kata.pid_of(container_id, name)) == f"{profile} (enforce)"
        assert kata.execute(container_id, "echo", "hello").stdout == "hello\n"
        kata.remove(container_id)
    finally:
        drop_in.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        daemon.stop()
        daemon.start()
