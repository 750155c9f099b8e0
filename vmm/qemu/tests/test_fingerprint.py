# SPDX-License-Identifier: Apache-2.0
"""What makes a template another one, and what must not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmm import identity
from vmm.hypervisor import Accelerator, Placement, VmConfig
from vmm.qemu.fingerprint import fingerprint


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    files = {name: tmp_path / name for name in ("binary", "kernel", "image", "initrd", "firmware")}
    for name, path in files.items():
        path.write_text(name)
    return VmConfig(id="one", state_dir=Path("/run/one"), max_vcpus=4, max_memory_mib=8192, **files)


def key(config: VmConfig, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "accelerator": Accelerator.TCG,
        "devices": [],
        "root_ports": 2,
        "extra": "layout 1",
    }
    return fingerprint(config, **(arguments | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_params": "quiet"},
        {"rootfs_type": "ext4"},
        {"machine_type": "pc-q35-7.2"},
        {"machine_accelerators": "nosmm"},
        {"cpu_features": "pmu=off"},
        {"vcpus": 2},
        {"max_vcpus": 5},
        {"memory_mib": 1024},
        {"max_memory_mib": 4096},
        {"memory_slots": 3},
        {"virtio_mem": True},
        {"shared_memory": False},
        {"private_memory": True, "shared_memory": False},
        {"generation_id": True},
        {"seccomp": "off"},
        {"initrd": None},
    ],
    ids="-".join,
)
def test_each_setting_counts(config: VmConfig, changes: dict[str, Any]) -> None:
    assert key(replace(config, **changes)) != key(config)


@pytest.mark.parametrize("name", ["binary", "kernel", "image", "initrd", "firmware"])
@pytest.mark.parametrize("how", ["written", "replaced"])
def test_each_file_counts(config: VmConfig, name: str, how: str) -> None:
    """Though size and time of its new content are those of the old."""
    path: Path = getattr(config, name)
    before, status = key(config), path.stat()
    if how == "replaced":
        path.rename(path.with_suffix(".old"))
    path.write_text(path.name.upper())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert key(config) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"accelerator": Accelerator.KVM},
        {"devices": [{"driver": "virtio-rng-pci"}]},
        {"root_ports": 3},
        {"extra": "layout 2"},
    ],
    ids="-".join,
)
def test_what_the_driver_and_its_user_add_counts(config: VmConfig, changes: Any) -> None:
    assert key(config, **changes) != key(config)


def test_under_kvm_the_host_s_processor_counts(
    config: VmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(processor: str, accelerator: Accelerator) -> str:
        monkeypatch.setattr(identity, "of_host_cpu", lambda: processor)
        return key(config, accelerator=accelerator)

    assert on("one", Accelerator.KVM) != on("another", Accelerator.KVM)
    assert on("one", Accelerator.TCG) == on("another", Accelerator.TCG)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: replace(config, id="two"),
        lambda config: replace(config, state_dir=Path("/run/two")),
        lambda config: replace(config, debug=True),
        lambda config: replace(config, placement=Placement(netns=Path("/run/netns/two"))),
    ],
    ids=["id", "state_dir", "debug", "placement"],
)
def test_what_each_sandbox_has_for_itself_does_not(
    config: VmConfig, change: Callable[[VmConfig], VmConfig]
) -> None:
    assert key(change(config)) == key(config)
