# SPDX-License-Identifier: Apache-2.0
"""Mount and network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shimv2 import mounts, namespaces
from shimv2.namespaces import (
    NamespaceError,
    is_host_network,
    new_network_namespace,
    open_network_namespace,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_own_mount_namespace_hides_ours_and_shows_the_hosts(tmp_path: Path) -> None:
    """Seen from a host whose / is shared, as systemd makes it."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "hosts").mkdir()
    script = f"""
import os
from shimv2 import mounts, namespaces
os.chdir({str(tmp_path)!r})
namespaces.unshare(namespaces.CLONE_NEWNS)          # plays the host
mounts.set_propagation("/", mounts.MS_REC | mounts.MS_PRIVATE)
mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SHARED)
ready, go = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:                                        # plays the shim
    host = namespaces.enter_own_mount_namespace()
    assert os.get_inheritable(host) is False
    mounts.mount("t", "ours", "tmpfs")
    os.write(ready[1], b"1"); os.read(go[0], 1)
    assert mounts.is_mount_point("hosts") and mounts.is_mount_point("ours")
    namespaces.setns(host, namespaces.CLONE_NEWNS)
    os.chdir({str(tmp_path)!r})
    assert not mounts.is_mount_point("ours")
    os._exit(0)
os.read(ready[0], 1)
mounts.mount("t", "hosts", "tmpfs")
assert not mounts.is_mount_point("ours")
os.write(go[1], b"1")
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_mounts_of_ours_reach_a_slave_as_virtiofsd_makes_one(tmp_path: Path, isolated) -> None:
    (tmp_path / "m").mkdir()

    def body() -> None:
        ready, go = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            namespaces.unshare(namespaces.CLONE_NEWNS)
            mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SLAVE)
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            os._exit(0 if mounts.is_mount_point(tmp_path / "m") else 1)
        os.read(ready[0], 1)
        mounts.mount("t", tmp_path / "m", "tmpfs")
        os.write(go[1], b"1")
        assert os.waitpid(pid, 0)[1] == 0

    isolated(body)


def test_a_new_network_namespace_has_only_a_loopback_that_is_up() -> None:
    before = os.readlink("/proc/self/ns/net")
    fd = new_network_namespace()
    try:
        assert os.readlink("/proc/self/ns/net") == before
        assert not os.get_inheritable(fd)
        path = f"/proc/self/fd/{fd}"
        assert not is_host_network(path)
        seen = subprocess.run(
            ["nsenter", f"--net={path}", "ip", "-o", "-4", "addr"],
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "127.0.0.1/8" in seen
        assert len(seen.splitlines()) == 1
        again = open_network_namespace(path)
        assert os.fstat(again).st_ino == os.fstat(fd).st_ino
        os.close(again)
    finally:
        os.close(fd)


def test_the_hosts_network_is_known_by_any_name(tmp_path: Path) -> None:
    assert is_host_network("/proc/self/ns/net")
    assert is_host_network(f"/proc/{os.getppid()}/ns/net")
    link = tmp_path / "link"
    link.symlink_to("/proc/self/ns/net")
    assert is_host_network(link)
    assert not is_host_network("/proc/self/ns/mnt")
    assert not is_host_network(tmp_path / "missing")


def test_what_is_no_network_namespace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    os.mkfifo(tmp_path / "fifo")
    for path in (file, tmp_path, tmp_path / "missing", tmp_path / "fifo", "/proc/self/ns/mnt"):
        with pytest.raises(NamespaceError) as caught:
            open_network_namespace(path)
        assert str(path) in str(caught.value)
