# SPDX-License-Identifier: Apache-2.0
"""containerd's device-mapper snapshotter: each root file system is a block device."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.kvmlab.suite.node import CONTAINERD_CONFIG, configured
from integration.kvmlab.suite.system import SystemContainerd, command_line, kata_configuration
from integration.lib.images import busybox_image
from integration.lib.kata import Kata
from integration.lib.leftovers import left_by

_POOL = "kvmlab-pool"
_SECTOR = 512
_BLOCK = 128  # sectors
_DATA, _METADATA = 1 << 30, 16 << 20  # bytes
_CONFIG = f"""
[plugins."io.containerd.snapshotter.v1.devmapper"]
  pool_name = "{_POOL}"
  root_path = "/var/lib/containerd/devmapper"
  base_image_size = "128MB"
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A thin pool on loop devices; of all tests, since containerd remembers what is in it."""
    directory = tmp_path_factory.mktemp("pool")
    with ExitStack() as stack:
        devices = []
        for name, size in (("metadata", _METADATA), ("data", _DATA)):
            file = directory / name
            with file.open("wb") as made:
                made.truncate(size)
            done = subprocess.run(
                ["losetup", "--find", "--show", file], check=True, capture_output=True, text=True
            )
            devices.append(done.stdout.strip())
            stack.callback(subprocess.run, ["losetup", "-d", devices[-1]], check=True)
        table = f"0 {_DATA // _SECTOR} thin-pool {' '.join(devices)} {_BLOCK} 32768"
        subprocess.run(["dmsetup", "create", _POOL, "--table", table], check=True)
        stack.callback(_remove, _POOL)
        yield
        for name in mapped():
            if name.startswith(f"{_POOL}-"):  # what containerd has of images
                _remove(name)


def mapped() -> list[str]:
    """Names of device-mapper's devices."""
    done = subprocess.run(["dmsetup", "ls"], check=True, capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines()]


def _remove(name: str) -> None:
    subprocess.run(["dmsetup", "remove", "--retry", name], check=True)


@pytest.fixture(scope="module")
def snapshotter(system: SystemContainerd, pool: None) -> Iterator[str]:
    with configured(system, CONTAINERD_CONFIG.read_text() + _CONFIG):
        system.ctr("images", "import", "--snapshotter", "devmapper", busybox_image())
        yield "devmapper"


def test_a_container_on_a_thin_volume(kata: Kata, snapshotter: str) -> None:
    flags = ("--snapshotter", snapshotter)
    container_id = kata.start("sleep", "1000", flags=flags)
    assert any(name.startswith(f"{_POOL}-snap-") for name in mapped())
    script = "dd if=/dev/urandom of=/data bs=1M count=16 2>/dev/null; sync; sha256sum </data"
    written = kata.execute(container_id, "sh", "-c", script).stdout
    assert kata.execute(container_id, "sha256sum", "/data").stdout.split()[0] in written
    kata.remove(container_id)
    assert kata.run("cat", "/data", flags=flags, check=False).returncode != 0
    left = left_by(kata.mark)
    assert not left, f"left behind: {left}"


def test_clones_map_the_memory_of_their_template(
    kata: Kata, snapshotter: str, tmp_path: Path
) -> None:
    """With a block device as root and the kernel's vsock no device needs shared memory."""
    configuration = kata_configuration(
        '[hypervisor.qemu]\nshared_fs = "none"\n'
        f'[factory]\nenable_template = true\ntemplate_path = "{tmp_path}/t"\n'
    )
    factory = ("kata-runtime", "--config", configuration, "factory")
    subprocess.run([*factory, "init"], check=True, timeout=300)
    try:
        (memory,) = tmp_path.glob("t/*/memory")
        before = hashlib.sha256(memory.read_bytes()).digest()
        flags = ("--snapshotter", snapshotter, "--runtime-config-path", str(configuration))
        clones = [kata.start("sleep", "1000", flags=flags) for _ in range(2)]
        for number, container_id in enumerate(clones):
            vmm = kata.pid_of(container_id, "vmm")
            assert "-incoming" in command_line(vmm)
            mapped = Path(f"/proc/{vmm}/smaps").read_text().splitlines()
            kinds = {line.split()[1][3] for line in mapped if line.endswith(f" {memory}")}
            assert kinds == {"p"}, "its memory is the template's, copy-on-write"
            script = f"echo {number} >/mine; sync; cat /mine"
            assert kata.execute(container_id, "sh", "-c", script).stdout == f"{number}\n"
        for number, container_id in enumerate(clones):
            assert kata.execute(container_id, "cat", "/mine").stdout == f"{number}\n"
            kata.remove(container_id)
        assert hashlib.sha256(memory.read_bytes()).digest() == before
    finally:
        subprocess.run([*factory, "destroy"], check=True)
