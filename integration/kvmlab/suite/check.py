# SPDX-License-Identifier: Apache-2.0
"""`kata-runtime check` in each kind of place, and that containers start there as it says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.kvmlab.suite.system import VHOST_VSOCK, command_line, modules
from integration.lib.kata import Kata, wait_until

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def findings(*launcher: str) -> dict[str, tuple[str, str]]:
    """(state, detail) of each finding, by its name."""
    command = [*launcher, "kata-runtime", "check", "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    return {
        row["name"]: (row["state"], row["detail"]) for row in json.loads(done.stdout)["findings"]
    }


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Kernel modules unloaded, in this order; loaded again after."""
    wait_until(lambda: modules().get(names[0]) == 0, 15, f"nobody uses {names[0]}")
    subprocess.run(["rmmod", *names], check=True)
    try:
        yield
    finally:
        subprocess.run(["modprobe", "-a", *names], check=True)


@contextmanager
def covered(path: Path, cover: Path) -> Iterator[None]:
    """`cover` seen instead of `path`, by everybody."""
    subprocess.run(["mount", "--bind", cover, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def module_folder(name: str) -> Path:
    done = subprocess.run(["modinfo", "-n", name], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).parent


class TestKvm:
    def test_usable_and_nested(self) -> None:
        state, detail = findings()["KVM"]
        assert state == "ok"
        assert "nested" in detail

    def test_absent(self) -> None:
        with without("kvm_amd"):
            state, detail = findings()["KVM"]
        assert (state, detail.split()[0]) == ("fallback", "absent")

    def test_no_permission(self) -> None:
        state, detail = findings(*NOBODY)["KVM"]
        assert state == "fallback"
        assert detail.startswith("no permission")

    def test_present_but_useless(self, tmp_path: Path) -> None:
        """As under PVM: the device opens, and the CPU can't virtualise."""
        cover = tmp_path / "cpuinfo"
        cover.write_text(Path("/proc/cpuinfo").read_text().replace(" svm ", " "))
        with covered(Path("/proc/cpuinfo"), cover):
            state, detail = findings()["KVM"]
        assert state == "fallback"
        assert detail.startswith("present but useless")


class TestVhostVsock:
    def test_loadable_is_loaded_by_the_first_use(self, kata: Kata) -> None:
        """The node is there without its module, as systemd leaves it at boot."""
        with without("vhost_vsock"):
            assert Path(VHOST_VSOCK).exists()
            container_id = kata.start("sleep", "1000")
            words = command_line(kata.pid_of(container_id, "vmm"))
            assert any('"vhost-vsock-pci"' in word for word in words)
            assert findings()["vhost-vsock"] == ("ok", VHOST_VSOCK)
            kata.remove(container_id)

    def test_without_a_node_it_is_loadable(self) -> None:
        with without("vhost_vsock"):
            node = Path(VHOST_VSOCK)
            aside = node.rename(node.with_suffix(".aside"))
            try:
                state, detail = findings()["vhost-vsock"]
            finally:
                aside.rename(node)
        assert state == "fallback"
        assert "loadable" in detail

    def test_absent_and_another_device_takes_its_place(self, kata: Kata, tmp_path: Path) -> None:
        folder = module_folder("vhost_vsock")
        with without("vhost_vsock"), covered(folder, tmp_path):
            state, detail = findings()["vhost-vsock"]
            assert (state, "not in this kernel" in detail) == ("fallback", True)
            container_id = kata.start("sleep", "1000")
            words = command_line(kata.pid_of(container_id, "vmm"))
            assert any('"vhost-user-vsock-pci"' in word for word in words)
            assert kata.execute(container_id, "echo", "hello").stdout == "hello\n"
            kata.remove(container_id)

    def test_no_permission(self) -> None:
        assert findings(*NOBODY)["vhost-vsock"][1].endswith(
            "no permission; our vhost-user device is used"
        )


@pytest.fixture(autouse=True)
def _everything_is_loaded() -> None:
    assert {"kvm_amd", "vhost_vsock"} <= set(modules())
