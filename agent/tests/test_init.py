# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent import cmdline, init, mounts


def _guest_root(root: Path) -> None:
    """The directories our image has, and a chroot into them."""
    for name in ("proc", "sys", "dev", "run", "tmp", "etc"):
        (root / name).mkdir()
    (root / "etc/resolv.conf").touch()
    (root / "etc/machine-id").touch()
    os.chroot(root)
    os.chdir("/")


def _mounted() -> dict[str, str]:
    return {point: fstype for _, point, fstype in mounts.mounted()}


def test_early_mounts_everything_once(tmp_path: Path, namespaces: Callable[..., Any]) -> None:
    def child() -> tuple[dict[str, str], int, int, list[str]]:
        _guest_root(tmp_path)
        init.enable_controllers = lambda directory: []  # they would be the host's own
        config = cmdline.parse("systemd.unified_cgroup_hierarchy=1")
        warnings = init.early(config)
        first = len(mounts.mounted())
        warnings += init.early(config)
        return _mounted(), first, len(mounts.mounted()), warnings

    table, first, second, warnings = namespaces(child)
    assert first == second
    wanted = {
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/dev/shm": "tmpfs",
        "/run": "tmpfs",
        "/tmp": "tmpfs",
        "/sys/fs/cgroup": "cgroup2",
    }
    assert wanted.items() <= table.items()
    assert not [text for text in warnings if "mount" in text or "loopback" in text]


def test_loopback_is_up(namespaces: Callable[..., Any]) -> None:
    def child() -> str:
        init.loopback_up()
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        return "connected"

    assert namespaces(child) == "connected"


def test_version_1_hierarchies_when_asked(tmp_path: Path, namespaces: Callable[..., Any]) -> None:
    def child() -> dict[str, str]:
        _guest_root(tmp_path)
        init.early(cmdline.parse("systemd.unified_cgroup_hierarchy=0"))
        return _mounted()

    with open("/proc/cgroups", encoding="ascii") as file:
        enabled = [line.split()[0] for line in file if line.split()[-1] == "1"]
    with open("/proc/mounts", encoding="ascii") as file:
        in_use = [name for name in enabled if f"/{name} cgroup " in file.read()]
    table = namespaces(child)
    assert table["/sys/fs/cgroup"] == "tmpfs"
    for name in in_use:
        assert table[f"/sys/fs/cgroup/{name}"] == "cgroup"


def test_enable_controllers_leaves_out_the_refused_one(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids unheard-of\n")
    written = []

    def write(path: str, text: str) -> None:
        if "+memory" in text:
            raise OSError(16, "busy")
        written.append(text)

    monkeypatch.setattr(init, "_write", write)
    warnings = init.enable_controllers(str(tmp_path))
    assert written == ["+cpu", "+pids"]
    assert len(warnings) == 1
    assert "memory" in warnings[0]


def test_dns_is_bound_over_the_read_only_file(
    tmp_path: Path, namespaces: Callable[..., Any]
) -> None:
    target = tmp_path / "resolv.conf"
    target.write_text("# empty\n")

    def child() -> list[str]:
        seen = []
        for lines in (["nameserver 10.0.0.2", "search a.b\n"], ["nameserver 10.0.0.3"]):
            init.set_dns(lines, str(target), str(tmp_path / "sandbox"))
            seen.append(target.read_text())
        seen.append(str(sum(point == str(target) for _, point, _ in mounts.mounted())))
        return seen

    assert namespaces(child) == [
        "nameserver 10.0.0.2\nsearch a.b\n",
        "nameserver 10.0.0.3\n",
        "1",
    ]
    assert target.read_text() == "# empty\n"


def test_dns_without_a_target(tmp_path: Path) -> None:
    init.set_dns(["nameserver 1.1.1.1"], str(tmp_path / "none"), str(tmp_path / "sandbox"))
    assert list(tmp_path.iterdir()) == []


def test_machine_id_changes_in_place(tmp_path: Path, namespaces: Callable[..., Any]) -> None:
    target = tmp_path / "machine-id"
    target.touch()

    def child() -> list[str]:
        path = str(tmp_path / "id")
        one = init.new_machine_id(str(target), path)
        assert target.read_text() == one + "\n"
        two = init.new_machine_id(str(target), path)
        assert target.read_text() == two + "\n"
        return [one, two]

    one, two = namespaces(child)
    assert one != two
    assert len(one) == len(two) == 32


def test_hostname_is_cut_at_64_bytes(namespaces: Callable[..., Any]) -> None:
    def child() -> str:
        init.set_hostname("ü" * 40)
        return socket.gethostname()

    assert namespaces(child) == "ü" * 32
