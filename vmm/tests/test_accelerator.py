# SPDX-License-Identifier: Apache-2.0
"""KVM only where it can work."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.accelerator import choose, detect
from vmm.errors import VmmConfigError
from vmm.hypervisor import Accelerator


@pytest.fixture
def kvm_device(tmp_path: Path) -> Path:
    path = tmp_path / "kvm"
    path.touch()
    return path


def cpuinfo(tmp_path: Path, flags: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: vmx lookalike\nflags\t\t: {flags}\nbugs\t: x\n")
    return path


@pytest.mark.parametrize("flags", ["fpu vmx sse", "svm"])
def test_kvm_with_hardware(tmp_path: Path, kvm_device: Path, flags: str) -> None:
    info = cpuinfo(tmp_path, flags)
    assert detect(kvm_device, info).accelerator is Accelerator.KVM
    assert choose(Accelerator.AUTO, kvm_device, info) is Accelerator.KVM
    assert choose(Accelerator.TCG, kvm_device, info) is Accelerator.TCG


def test_device_without_hardware_is_not_used(tmp_path: Path, kvm_device: Path) -> None:
    info = cpuinfo(tmp_path, "fpu sse hypervisor vmxnot")
    assert choose(Accelerator.AUTO, kvm_device, info) is Accelerator.TCG
    with pytest.raises(VmmConfigError, match="vmx nor svm"):
        choose(Accelerator.KVM, kvm_device, info)


def test_no_device(tmp_path: Path) -> None:
    info = cpuinfo(tmp_path, "vmx")
    assert choose(Accelerator.AUTO, tmp_path / "nosuch", info) is Accelerator.TCG
    with pytest.raises(VmmConfigError, match="nosuch"):
        choose(Accelerator.KVM, tmp_path / "nosuch", info)


def test_unreadable_cpuinfo_means_tcg(tmp_path: Path, kvm_device: Path) -> None:
    assert detect(kvm_device, tmp_path / "nosuch").accelerator is Accelerator.TCG
