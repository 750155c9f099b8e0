# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime env``: versions, paths and settings in force, by the names Kata's has."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shimv2.config import Config, locate
from shimv2.config.document import toml_value
from shimv2.version import VERSION
from vmm import accelerator
from vmm.hypervisor import Accelerator

from . import programs

FORMAT_VERSION = "1.0.27"  # of Kata's own output, whose names are used


def environment(config: Config) -> dict[str, Any]:
    """Tables of what is in force; values are texts, numbers, truth values or lists."""
    vm, agent, runtime = config.hypervisor, config.agent, config.runtime
    prefix = locate.installed_prefix()
    return {
        "Meta": {"Version": FORMAT_VERSION},
        "Kernel": {"Path": str(vm.kernel), "Parameters": vm.kernel_params},
        "Image": {"Path": str(vm.image or ""), "RootfsType": vm.rootfs_type},
        "Initrd": {"Path": str(vm.initrd or "")},
        "Hypervisor": {
            "Name": vm.name,
            "Path": str(vm.path),
            "Version": _version(vm.path),
            "MachineType": vm.machine_type,
            "Accelerator": vm.accelerator,
            "AcceleratorFound": accelerator.detect().accelerator.value,
            "BlockDeviceDriver": vm.block_device_driver,
            "EntropySource": str(vm.entropy_source),
            "SharedFS": vm.shared_fs,
            "VirtioFSDaemon": str(vm.virtio_fs_daemon),
            "VirtioFSDaemonVersion": _virtiofsd(vm.virtio_fs_daemon),
            "VirtioFSCache": vm.virtio_fs_cache,
            "Vsock": vm.vsock,
            "DefaultVCPUs": vm.default_vcpus,
            "DefaultMaxVCPUs": vm.default_maxvcpus,
            "DefaultMemory": vm.default_memory,
            "DefaultMaxMemory": vm.default_maxmemory,
            "MemorySlots": vm.memory_slots,
            "EnableAnnotations": list(vm.enable_annotations),
            "Debug": vm.enable_debug,
        },
        "Agent": {"Debug": agent.enable_debug, "DebugConsole": agent.debug_console_enabled},
        "Runtime": {
            "Path": str(_shim(prefix)),
            "Debug": runtime.enable_debug,
            "DisableGuestSeccomp": runtime.disable_guest_seccomp,
            "DisableNewNetNs": runtime.disable_new_netns,
            "InterNetworkingModel": runtime.internetworking_model,
            "SandboxCgroupOnly": runtime.sandbox_cgroup_only,
            "StaticSandboxResourceMgmt": runtime.static_sandbox_resource_mgmt,
            "Version": {"Semver": VERSION, "Commit": commit(), "OCI": "1.2.0"},
            "Config": {
                "Path": str(config.source or ""),
                "DropIns": [str(path) for path in config.drop_ins],
                "Warnings": list(config.warnings),
            },
            "Python": {"Version": platform.python_version(), "Path": sys.executable},
        },
        "Host": {
            "Kernel": platform.release(),
            "Architecture": platform.machine(),
            "VMContainerCapable": accelerator.detect().accelerator is Accelerator.KVM,
            "SupportVSocks": Path("/dev/vhost-vsock").exists(),
            "Distro": _distribution(),
            "CPU": {"Model": _cpu_model(), "CPUs": os.cpu_count() or 1},
            "Memory": _memory(),
        },
    }


def commit(tree: Path = Path(__file__).parents[2]) -> str:
    """The commit this was installed from; "" in a source tree."""
    try:
        return (tree / "COMMIT").read_text().strip()
    except OSError:
        return ""


def _shim(prefix: Path | None) -> Path:
    return (prefix or Path("/usr/local")) / "bin/containerd-shim-kata-v2"


def _version(path: Path) -> str:
    try:
        return programs.qemu(path).version
    except programs.ProgramError as error:
        return f"<<unknown: {error}>>"


def _virtiofsd(path: Path) -> str:
    try:
        found = programs.virtiofsd(path)
    except programs.ProgramError as error:
        return f"<<unknown: {error}>>"
    return f"{found.version} ({found.kind})"


def _distribution() -> dict[str, str]:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return {"Name": release.get("NAME", ""), "Version": release.get("VERSION_ID", "")}


def _cpu_model() -> str:
    for line in accelerator.CPUINFO.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def _memory() -> dict[str, int]:
    """MiB."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) >> 10
    return {
        "TotalMiB": values["MemTotal"],
        "FreeMiB": values["MemFree"],
        "AvailableMiB": values.get("MemAvailable", 0),
    }


def as_toml(tables: Mapping[str, Any], at: str = "") -> str:
    """The tables as TOML, as Kata's command prints them."""
    lines = []
    plain = {name: value for name, value in tables.items() if not isinstance(value, Mapping)}
    if at:
        lines.append(f"[{at}]")
    lines += [f"  {name} = {toml_value(value)}" for name, value in plain.items()]
    if at:
        lines.append("")
    for name, value in tables.items():
        if isinstance(value, Mapping):
            lines.append(as_toml(value, f"{at}.{name}" if at else name))
    return "\n".join(lines)
