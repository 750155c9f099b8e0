# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shimv2.config import Config, HypervisorConfig
from shimv2.runtime_cli import check, main, programs
from shimv2.runtime_cli.check import Host, State

CAPABLE = "processor\t: 0\nflags\t\t: fpu vme svm sse\n"
USELESS = "processor\t: 0\nflags\t\t: fpu vme sse hypervisor\n"


def script(path: Path, text: str, status: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def config(**values: object) -> Config:
    return Config(hypervisor=HypervisorConfig(**values))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "kvm").touch()
    (tmp_path / "cpuinfo").write_text(CAPABLE)
    return Host(
        kvm=tmp_path / "kvm",
        cpuinfo=tmp_path / "cpuinfo",
        vhost_vsock=tmp_path / "vhost-vsock",
        modules=tmp_path / "modules",
        cgroups=tmp_path / "cgroup",
        search=str(tmp_path / "bin"),
    )


def test_kvm_usable(host):
    found = check.kvm(config(), host)
    assert (found.state, found.detail[:6]) == (State.OK, "usable")


@pytest.mark.parametrize(("flags", "nested"), [("svm", False), ("hypervisor svm", True)])
def test_kvm_nested_or_not(host, flags, nested):
    host.cpuinfo.write_text(f"flags\t\t: fpu {flags}\n")
    assert ("(nested" in check.kvm(config(), host).detail) is nested


def test_kvm_present_but_useless(host):
    host.cpuinfo.write_text(USELESS)
    found = check.kvm(config(), host)
    assert found.state is State.FALLBACK
    assert "present but useless" in found.detail
    assert "TCG" in found.detail


def test_kvm_absent(host):
    host.kvm.unlink()
    found = check.kvm(config(), host)
    assert (found.state, found.detail[:6]) == (State.FALLBACK, "absent")


def test_kvm_without_permission(host, monkeypatch):
    def refuse(path, flags, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = check.kvm(config(), host)
    assert "no permission" in found.detail
    assert "group kvm" in found.remedy


def test_kvm_asked_for_by_name_but_absent_is_no_fallback(host):
    host.kvm.unlink()
    assert check.kvm(config(accelerator="kvm"), host).state is State.MISSING


@pytest.mark.parametrize(
    ("text", "status", "state", "detail"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2)", 0, State.OK, "7.2.22 at"),
        ("QEMU emulator version 10.0.3", 0, State.OK, "10.0.3 at"),
        ("QEMU emulator version 6.2.0", 0, State.MISSING, "7.2 or newer"),
        ("something else", 0, State.MISSING, "does not say that it is QEMU"),
        ("cannot open libfoo.so", 127, State.MISSING, "failed: cannot open libfoo.so"),
    ],
)
def test_qemu(tmp_path, text, status, state, detail):
    found = check.qemu(config(path=script(tmp_path / "qemu", text, status)))
    assert found.state is state
    assert detail in found.detail


def test_qemu_missing(tmp_path):
    found = check.qemu(config(path=tmp_path / "none"))
    assert found.state is State.MISSING
    assert "No such file" in found.detail
    assert found.remedy == "apt-get install qemu-system-x86"


@pytest.mark.parametrize(
    ("text", "kind", "version"),
    [
        ("virtiofsd version 7.2.22 (Debian)\nCopyright", "C", "7.2.22"),
        ("virtiofsd 1.13.0", "Rust", "1.13.0"),
        ("virtiofsd v1.10.1", "Rust", "1.10.1"),
    ],
)
def test_both_kinds_of_virtiofsd(tmp_path, text, kind, version):
    found = programs.virtiofsd(script(tmp_path / "virtiofsd", text))
    assert (found.kind, found.version) == (kind, version)


def test_no_virtiofsd_needed_without_a_shared_file_system(tmp_path):
    wanted = config(shared_fs="none", virtio_fs_daemon=tmp_path / "none")
    assert check.virtiofsd(wanted).state is State.OK
    assert check.virtiofsd(config(virtio_fs_daemon=tmp_path / "none")).state is State.MISSING


def test_vsock(host):
    assert "not in this kernel" in check.vsock(config(), host).detail
    assert check.vsock(config(vsock="vhost"), host).state is State.MISSING
    drivers = host.modules / "kernel/drivers/vhost"
    drivers.mkdir(parents=True)
    (drivers / "vhost_vsock.ko.xz").touch()
    found = check.vsock(config(), host)
    assert (found.state, found.remedy) == (State.FALLBACK, "modprobe vhost_vsock")
    host.vhost_vsock.touch()
    assert check.vsock(config(), host).state is State.OK


def test_vsock_whose_module_does_not_load(host):
    """systemd makes the node at boot, from what modules there are for the kernel."""
    host.vhost_vsock.symlink_to("/dev/nonesuch")
    assert check.vsock(config(), host).state is State.FALLBACK


def test_vsock_without_permission(host, monkeypatch):
    def refuse(path, flags, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    found = check.vsock(config(), host)
    assert (found.state, found.remedy) == (State.FALLBACK, "run as root")


def test_assets(tmp_path):
    file = tmp_path / "vmlinux"
    assert check.asset("kernel", file).state is State.MISSING
    file.touch()
    assert check.asset("kernel", file).detail.endswith("empty")
    file.write_bytes(b"x" * (2 << 20))
    assert check.asset("kernel", file).detail.endswith("2 MiB")


def test_cgroup_versions(host):
    assert check.cgroups(host).state is State.FALLBACK
    (host.cgroups / "memory").mkdir(parents=True)
    (host.cgroups / "memory/cgroup.procs").touch()
    assert check.cgroups(host).detail == "version 1"
    (host.cgroups / "cgroup.controllers").touch()
    assert check.cgroups(host).detail == "version 2"


def test_tools_and_engine(host, tmp_path):
    assert check.tool(host, "ip", "iproute2", "x").remedy == "apt-get install iproute2"
    assert check.engine(host).state is State.FALLBACK
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin/ip", "")
    script(tmp_path / "bin/containerd", "containerd example.org/containerd 1.6.20~ds1 1.6.20")
    assert check.tool(host, "ip", "iproute2", "x").state is State.OK
    assert check.engine(host).detail.startswith("1.6.20 at")


def test_exit_status_and_json(tmp_path, capsys):
    kernel, image = tmp_path / "k", tmp_path / "i"
    qemu = script(tmp_path / "qemu", "QEMU emulator version 8.0.0")
    fsd = script(tmp_path / "fsd", "virtiofsd 1.13.0")
    file = tmp_path / "configuration.toml"
    file.write_text(
        f'[hypervisor.qemu]\npath = "{qemu}"\nvirtio_fs_daemon = "{fsd}"\n'
        f'kernel = "{kernel}"\nimage = "{image}"\nbogus = 1\n'
    )
    kernel.write_text("k")
    image.write_text("i")
    assert main(["--config", str(file), "check"]) == 0
    out = capsys.readouterr().out
    assert "Containers can run in VMs" in out
    assert "bogus: unknown key" in out
    image.unlink()
    assert main(["--config", str(file), "check", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["able"] is False
    assert [f["name"] for f in answer["findings"] if f["state"] == "missing"] == ["image"]


def test_a_bad_configuration_is_a_finding(tmp_path, capsys):
    file = tmp_path / "configuration.toml"
    file.write_text("[hypervisor.qemu]\ndefault_memory = 'x'\n")
    assert main(["--config", str(file), "check"]) == 1
    out = capsys.readouterr().out
    assert "missing   configuration" in out
    assert "default_memory" in out
