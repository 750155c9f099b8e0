# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime check``: can this host run containers in VMs, how well, and what would help."""

from __future__ import annotations

import enum
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shimv2.config import Config
from vmm import accelerator
from vmm.hypervisor import Accelerator

from . import programs

MIN_QEMU = (7, 2)


class State(enum.Enum):
    """What a finding means for running containers."""

    OK = "ok"
    FALLBACK = "fallback"  # works, in another or slower way
    MISSING = "missing"  # containers can't run


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        detail: what was found, and what is done about it.
        remedy: what the user can do; "" when there is nothing to do.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """Where things lie on a host; tests look elsewhere."""

    kvm: Path = accelerator.KVM_DEVICE
    cpuinfo: Path = accelerator.CPUINFO
    vhost_vsock: Path = Path("/dev/vhost-vsock")
    modules: Path = Path("/lib/modules", os.uname().release)
    cgroups: Path = Path("/sys/fs/cgroup")
    search: str = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

    def which(self, name: str) -> Path | None:
        """A program on this host's search path."""
        found = shutil.which(name, path=self.search)
        return Path(found) if found else None


def check(config: Config, host: Host) -> Iterator[Finding]:
    """All findings, the ones that matter most first."""
    yield architecture()
    yield user()
    yield kvm(config, host)
    yield qemu(config)
    yield virtiofsd(config)
    yield asset("kernel", config.hypervisor.kernel)
    if config.hypervisor.initrd:
        yield asset("initrd", config.hypervisor.initrd)
    elif config.hypervisor.image:
        yield asset("image", config.hypervisor.image)
    yield vsock(config, host)
    yield cgroups(host)
    yield tool(host, "ip", "iproute2", "pods get no network")
    yield tool(host, "tc", "iproute2", "pods get no network")
    yield engine(host)


def architecture() -> Finding:
    """Only x86-64 has been built and tried."""
    machine = platform.machine()
    if machine == "x86_64":
        return Finding("architecture", State.OK, machine)
    return Finding("architecture", State.MISSING, f"{machine}; only x86_64 is supported")


def user() -> Finding:
    """Mounts, cgroups and namespaces need root."""
    if os.geteuid() == 0:
        return Finding("user", State.OK, "root")
    return Finding(
        "user",
        State.FALLBACK,
        f"uid {os.geteuid()}: some of this can't be looked at; containers are run by root",
        "run this as root",
    )


def kvm(config: Config, host: Host) -> Finding:
    """Usable, or why not: absent, no permission, or there but useless."""
    name = "KVM"
    wanted = config.hypervisor.accelerator
    found = accelerator.detect(host.kvm, host.cpuinfo)
    if found.accelerator is Accelerator.KVM:
        if wanted == "tcg":
            return Finding(name, State.OK, 'usable, but accelerator = "tcg" is configured')
        nested = " (nested: this host is a VM itself)" if accelerator.is_guest(host.cpuinfo) else ""
        return Finding(name, State.OK, f"usable: {found.reason}{nested}")
    if not host.kvm.exists():
        why = f"absent ({host.kvm} does not exist)"
        remedy = "enable virtualisation in the firmware, then: modprobe kvm_intel or kvm_amd"
    elif not os.access(host.kvm, os.R_OK | os.W_OK):
        why, remedy = f"no permission ({found.reason})", "run as root, or join the group kvm"
    else:
        why = f"present but useless ({found.reason})"
        remedy = "on a VM: ask for nested virtualisation"
    if wanted == "kvm":
        return Finding(name, State.MISSING, f'{why}; accelerator = "kvm" is configured', remedy)
    return Finding(
        name, State.FALLBACK, f"{why}; emulation (TCG) is used, several times slower", remedy
    )


def qemu(config: Config) -> Finding:
    """The VMM and whether it is new enough."""
    path = config.hypervisor.path
    if config.hypervisor.name != "qemu":
        return Finding(
            "VMM", State.MISSING, f"{config.hypervisor.name} is configured, only qemu is supported"
        )
    try:
        found = programs.qemu(path)
    except programs.ProgramError as error:
        return Finding("QEMU", State.MISSING, str(error), "apt-get install qemu-system-x86")
    if found.numbers < MIN_QEMU:
        return Finding("QEMU", State.MISSING, f"{found.version} at {path}; 7.2 or newer is needed")
    return Finding("QEMU", State.OK, f"{found.version} at {path}")


def virtiofsd(config: Config) -> Finding:
    """The daemon behind the shared file system, and which of the two kinds it is."""
    if config.hypervisor.shared_fs == "none":
        return Finding("virtiofsd", State.OK, 'not used (shared_fs = "none")')
    path = config.hypervisor.virtio_fs_daemon
    try:
        found = programs.virtiofsd(path)
    except programs.ProgramError as error:
        remedy = "apt-get install qemu-system-common (Debian 12) or virtiofsd (newer)"
        return Finding("virtiofsd", State.MISSING, str(error), remedy)
    return Finding("virtiofsd", State.OK, f"{found.version} ({found.kind}) at {path}")


def asset(name: str, path: Path) -> Finding:
    """A guest file, there and readable."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        remedy = "make guest && make install, or set it in configuration.toml"
        return Finding(name, State.MISSING, f"{path}: {error.strerror}", remedy)
    if not size:
        return Finding(name, State.MISSING, f"{path}: empty")
    return Finding(name, State.OK, f"{path}, {size / (1 << 20):.0f} MiB")


def vsock(config: Config, host: Host) -> Finding:
    """The kernel's vhost-vsock: present, loadable, or absent."""
    name, wanted = "vhost-vsock", config.hypervisor.vsock
    try:  # systemd makes the node; opening it loads the module
        os.close(os.open(host.vhost_vsock, os.O_RDWR | os.O_CLOEXEC))
        return Finding(name, State.OK, str(host.vhost_vsock))
    except PermissionError:
        denied = True
    except OSError:
        denied = False
    if denied:
        detail, remedy = f"{host.vhost_vsock}: no permission", "run as root"
    elif any(host.modules.glob("kernel/drivers/vhost/vhost_vsock.ko*")):
        detail, remedy = "not loaded, but loadable", "modprobe vhost_vsock"
    else:
        detail, remedy = "not in this kernel", ""
    if wanted == "vhost":
        return Finding(name, State.MISSING, f'{detail}; vsock = "vhost" is configured', remedy)
    other = "the serial channel" if wanted == "serial" else "our vhost-user device"
    return Finding(name, State.FALLBACK, f"{detail}; {other} is used", remedy)


def cgroups(host: Host) -> Finding:
    """Which version limits the host side of a sandbox."""
    if (host.cgroups / "cgroup.controllers").exists():
        return Finding("cgroups", State.OK, "version 2")
    if any(host.cgroups.glob("*/cgroup.procs")):
        return Finding("cgroups", State.OK, "version 1")
    detail = f"none mounted on {host.cgroups}; nothing limits the VMM on the host"
    return Finding("cgroups", State.FALLBACK, detail)


def tool(host: Host, name: str, package: str, without: str) -> Finding:
    """A program that something depends on."""
    path = host.which(name)
    if path:
        return Finding(name, State.OK, str(path))
    return Finding(name, State.FALLBACK, f"not found: {without}", f"apt-get install {package}")


def engine(host: Host) -> Finding:
    """containerd; CRI-O and others are as good, so its absence is no obstacle."""
    path = host.which("containerd")
    if path is None:
        detail = "not found (an engine that speaks shim v2 is needed to start containers)"
        return Finding("containerd", State.FALLBACK, detail, "apt-get install containerd")
    try:
        found = programs.any_program(path)
    except programs.ProgramError as error:
        return Finding("containerd", State.FALLBACK, str(error))
    return Finding("containerd", State.OK, f"{found.version} at {path}")
