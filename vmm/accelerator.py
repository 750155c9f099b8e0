# SPDX-License-Identifier: Apache-2.0
"""Which accelerator this host really has.

A /dev/kvm is not enough: where the host is itself a paravirtual guest (PVM) the device
opens, but the CPU has neither vmx nor svm and stock guest kernels hang on it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import VmmConfigError
from vmm.hypervisor import Accelerator

KVM_DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")

_VIRTUALISATION_FLAGS = frozenset({"vmx", "svm"})


@dataclass(frozen=True, slots=True)
class Detection:
    """What was found, and why KVM is not used if it is not."""

    accelerator: Accelerator
    reason: str


def detect(kvm_device: Path = KVM_DEVICE, cpuinfo: Path = CPUINFO) -> Detection:
    """KVM if the device opens and the CPU can virtualise, else TCG."""
    try:
        os.close(os.open(kvm_device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Detection(Accelerator.TCG, f"{kvm_device}: {error.strerror}")
    if not _cpu_virtualises(cpuinfo):
        return Detection(
            Accelerator.TCG, f"{kvm_device} opens, but the CPU shows neither vmx nor svm"
        )
    return Detection(Accelerator.KVM, f"{kvm_device} and hardware virtualisation are there")


def choose(
    wanted: Accelerator, kvm_device: Path = KVM_DEVICE, cpuinfo: Path = CPUINFO
) -> Accelerator:
    """Resolve what the configuration asks for; never answers AUTO.

    Raises:
        VmmConfigError: KVM is asked for by name and cannot work here.
    """
    if wanted is Accelerator.TCG:
        return wanted
    found = detect(kvm_device, cpuinfo)
    if wanted is Accelerator.KVM and found.accelerator is not Accelerator.KVM:
        raise VmmConfigError(f'accelerator "kvm" cannot be used on this host: {found.reason}')
    return found.accelerator


def is_guest(cpuinfo: Path = CPUINFO) -> bool:
    """This host is a virtual machine itself: its KVM, if any, is nested."""
    return "hypervisor" in _cpu_flags(cpuinfo)


def _cpu_virtualises(cpuinfo: Path) -> bool:
    return not _VIRTUALISATION_FLAGS.isdisjoint(_cpu_flags(cpuinfo))


def _cpu_flags(cpuinfo: Path) -> list[str]:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags.group(1).split() if flags is not None else []
