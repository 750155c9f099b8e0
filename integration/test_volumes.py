# SPDX-License-Identifier: Apache-2.0
"""Volumes of a pod as a kubelet prepares them, in two containers of one VM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.lib import programs
from integration.lib.cri import CriNode
from integration.lib.crictl import CrictlError
from integration.lib.disks import loop_device
from integration.lib.kata import wait_until

_MIB = 1 << 20
_HOST_TO_CONTAINER, _BIDIRECTIONAL = 1, 2
_TOOL = "/volume-tool"


def _mount(kind: str, source: str | Path, point: Path, options: str = "defaults") -> None:
    point.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, source, point], check=True)


def _bind(source: Path, point: Path) -> None:
    point.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", source, point], check=True)


class ConfigMap:
    """A volume whose files a kubelet exchanges at once, by the link ``..data``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._version = 0
        directory.mkdir(parents=True)
        self.write("old")
        (directory / "key").symlink_to("..data/key")

    def write(self, text: str) -> None:
        self._version += 1
        name = f"..v{self._version}"
        (self.directory / name).mkdir()
        (self.directory / name / "key").write_text(text)
        (self.directory / "..data_tmp").symlink_to(name)
        before = self.directory / f"..v{self._version - 1}"
        (self.directory / "..data_tmp").rename(self.directory / "..data")
        if before.exists():
            shutil.rmtree(before)


@dataclass
class Volumes:
    """What is on the host, below `root`, and the two containers that have it."""

    node: CriNode
    root: Path
    config: ConfigMap
    pod: str = ""
    one: str = ""
    two: str = ""

    def run(self, container: str, script: str, timeout: float = 60) -> str:
        return self.node.execute(container, "sh", "-c", script, timeout=timeout)

    def in_background(self, container: str, command: str, log: str) -> None:
        self.run(container, f"{command} > {log} 2>&1 &")


def _prepare(root: Path, disk: Path) -> ConfigMap:
    """Args: disk: a directory that is in no memory; `root` may be, as /run mostly is."""
    for name in ("dir", "neighbours", "ro", "propagated"):
        (root / name).mkdir(parents=True)
    (root / "secret").write_text("of the host")
    (root / "dir/out").symlink_to(root / "secret")
    (root / "dir/up").symlink_to("../secret")
    (root / "neighbours/wanted").write_text("wanted")
    (root / "neighbours/unwanted").write_text("unwanted")
    (root / "dir/sub").mkdir()
    _bind(root / "dir/sub", root / "subpath")
    _mount("tmpfs", "inner", root / "ro/inner")
    empty = root / "kubernetes.io~empty-dir"
    _bind(disk, empty / "disk")
    _mount("tmpfs", "tmpfs", empty / "memory", f"size={8 * _MIB}")
    _mount("hugetlbfs", "nodev", empty / "huge", f"pagesize=2M,size={4 * _MIB}")
    return ConfigMap(root / "kubernetes.io~configmap/config")


def _mounts(root: Path) -> list[dict[str, Any]]:
    empty = root / "kubernetes.io~empty-dir"
    tool = programs.build("volume", programs.VOLUME)
    mmap = programs.build("shared-mmap", programs.SHARED_MMAP)

    def of(host: Path, inside: str, **more: Any) -> dict[str, Any]:
        return {"host_path": str(host), "container_path": inside, **more}

    return [
        of(root / "dir", "/dir"),
        of(root / "neighbours/wanted", "/wanted"),
        of(root / "subpath", "/sub"),
        of(root / "ro", "/ro", readonly=True),
        of(root / "ro", "/rro", readonly=True, recursive_read_only=True),
        of(root / "propagated", "/propagated", propagation=_HOST_TO_CONTAINER),
        of(root / "propagated", "/both", propagation=_BIDIRECTIONAL),
        of(root / "kubernetes.io~configmap/config", "/config", readonly=True),
        of(empty / "disk", "/disk"),
        of(empty / "memory", "/memory"),
        of(empty / "memory", "/dev/shm"),  # how a pod gets a larger one
        of(empty / "huge", "/huge"),
        of(tool, _TOOL, readonly=True),
        of(mmap, "/mmap", readonly=True),
    ]


@pytest.fixture
def volumes(node: CriNode) -> Iterator[Volumes]:
    """A pod whose two containers have all of them."""
    with ExitStack() as stack:
        root = Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=node.directory, prefix=node.mark))
        )
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        stack.callback(_unmount_below, root)
        found = Volumes(node, root, _prepare(root, disk))
        found.pod = node.run_pod(linux={"security_context": {"privileged": True}})
        stack.callback(node.remove_pod, found.pod)
        privileged = {"security_context": {"privileged": True}}  # Bidirectional needs it
        (root / "disk").write_bytes(b"raw disk".ljust(_MIB, b"\0"))
        device = stack.enter_context(loop_device(root / "disk"))
        disk = {"host_path": device, "container_path": "/dev/volume", "permissions": "rwm"}
        found.one, found.two = (
            node.start_container(
                found.pod,
                *("sleep", "1000"),
                mounts=_mounts(root),
                devices=[disk],
                linux=privileged,
            )
            for _ in range(2)
        )
        yield found


def _unmount_below(root: Path) -> None:
    # One by one: where mounts are shared, as systemd makes them, some go with others.
    while points := [p for p in _mount_points() if p.startswith(f"{root}/")]:
        subprocess.run(["umount", "--lazy", points[-1]], check=True)


def _mount_points() -> list[str]:
    return [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


@pytest.mark.one_edition
def test_volumes_of_a_pod(volumes: Volumes) -> None:
    """One pod for all of it: a pod is what takes the time."""
    _files(volumes)
    _links(volumes)
    _read_only(volumes)
    _raw_disk(volumes)
    _empty_dirs(volumes)
    _between_containers(volumes)
    _propagation(volumes)
    _config_map(volumes)
    _nothing_else_is_shared(volumes)
    _many_files(volumes)


def _files(v: Volumes) -> None:
    directory = v.root / "dir"
    (directory / "from-host").write_text("host")
    assert v.run(v.one, "cat /dir/from-host; echo guest > /dir/from-guest") == "host"
    assert (directory / "from-guest").read_text() == "guest\n"
    assert v.run(v.two, "cat /dir/from-guest") == "guest\n"
    v.run(v.one, "echo sub > /sub/file")
    assert (directory / "sub/file").read_text() == "sub\n"
    assert v.run(v.one, "cat /wanted; echo the end > /wanted") == "wanted"
    # As a kubelet reads what a container says at its end.
    assert (v.root / "neighbours/wanted").read_text() == "the end\n"
    # Beyond 4 GiB, and nearly all of it a hole.
    v.run(v.one, "echo end | dd of=/dir/large bs=1M seek=5000 2>/dev/null")
    large = (directory / "large").stat()
    assert large.st_size == 5000 * _MIB + 4
    assert large.st_blocks < 100
    v.run(v.one, f"{_TOOL} set-xattr /dir/from-guest value")
    assert os.getxattr(directory / "from-guest", "user.test") == b"value"
    assert v.run(v.two, f"{_TOOL} get-xattr /dir/from-guest") == "value\n"
    assert v.run(v.one, f"{_TOOL} direct /dir/direct") == "direct\n"
    assert (directory / "direct").read_bytes()[4096:] == b"d" * 4096
    assert v.run(v.one, "/mmap /dir/mapped") == "same\n"


def _links(v: Volumes) -> None:
    # They lead to a file of the host, and in the container to nothing.
    assert v.run(v.one, "cat /dir/out /dir/up 2>&1 || true").count("No such file") == 2
    assert v.run(v.one, "ln /dir/from-guest /dir/hard; stat -c %h /dir/hard") == "2\n"
    assert (v.root / "dir/hard").stat().st_ino == (v.root / "dir/from-guest").stat().st_ino
    v.run(v.one, "ln -s from-guest /dir/soft")
    assert os.readlink(v.root / "dir/soft") == "from-guest"


def _read_only(v: Volumes) -> None:
    paths = ("/ro/x", "/ro/inner/x", "/rro/x", "/rro/inner/x", "/config/x")
    told = v.run(v.one, f"touch {' '.join(paths)} 2>&1 || true")
    assert told.count("Read-only file system") == len(paths)


def _raw_disk(v: Volumes) -> None:
    """What a pod has as `volumeDevices`: one disk for both."""
    assert v.run(v.one, "head -c 8 /dev/volume") == "raw disk"
    v.run(v.one, "echo written | dd of=/dev/volume bs=4096 seek=2 conv=fsync 2>/dev/null")
    assert v.run(v.two, "dd if=/dev/volume bs=4096 skip=2 count=1 2>/dev/null | head -c 7") == (
        "written"
    )
    numbers = {v.run(container, "stat -c %t:%T /dev/volume") for container in (v.one, v.two)}
    assert numbers == {"fe:10\n"}
    assert (v.root / "disk").read_bytes()[8192:8199] == b"written"


def _empty_dirs(v: Volumes) -> None:
    empty = v.root / "kubernetes.io~empty-dir"
    v.run(v.one, "echo shared > /disk/file; echo shared > /memory/file")
    assert v.run(v.two, "cat /disk/file /memory/file /dev/shm/file") == "shared\n" * 3
    assert (empty / "disk/file").exists()
    assert not (empty / "memory/file").exists(), "it is the guest's memory"
    with pytest.raises(CrictlError, match="No space left"):
        v.run(v.one, "dd if=/dev/zero of=/memory/big bs=1M count=9")
    v.run(v.one, "rm /memory/big")
    assert "hugetlbfs" in v.run(v.one, "grep ' /huge ' /proc/mounts")
    v.run(v.one, f"fallocate -l {4 * _MIB} /huge/file")
    pages = v.run(v.two, "stat -c %s /huge/file; grep -E 'HugePages_(Total|Free)' /proc/meminfo")
    assert pages.split()[::2] == [str(4 * _MIB), "2", "0"], "both are used"
    with pytest.raises(CrictlError, match="No space left"):
        v.run(v.one, f"fallocate -l {6 * _MIB} /huge/file")


def _between_containers(v: Volumes) -> None:
    for directory in ("/dir", "/memory"):
        v.in_background(v.one, f"{_TOOL} listen {directory}/socket", "/listen.log")
        wait_until(
            lambda: v.run(v.two, f"test -S {directory}/socket && echo y || true"),  # noqa: B023
            10,
            f"a socket in {directory}",
        )
        assert v.run(v.two, f"{_TOOL} send {directory}/socket hello") == "hello\n"
        v.in_background(v.one, f"{_TOOL} hold {directory}/lock", "/hold.log")
        wait_until(lambda: v.run(v.one, "cat /hold.log") == "locked\n", 10, "a lock")
        assert v.run(v.two, f"{_TOOL} lock {directory}/lock") == "busy\n"
        v.run(v.one, "killall volume-tool")
        wait_until(
            lambda: v.run(v.two, f"{_TOOL} lock {directory}/lock") == "locked\n",  # noqa: B023
            10,
            "the lock goes with its holder",
        )
        v.run(v.one, f"rm {directory}/socket /hold.log")


def _propagation(v: Volumes) -> None:
    late = v.root / "propagated/late"
    _mount("tmpfs", "late", late)
    (late / "file").write_text("late")
    wait_until(
        lambda: v.run(v.one, "cat /propagated/late/file || true") == "late",
        10,
        "a later mount of the host is seen",
    )
    v.run(v.one, "mkdir /both/own; mount -t tmpfs own /both/own; touch /both/own/file")
    assert list((v.root / "propagated/own").iterdir()) == []
    log = v.node.containerd.log.read_text()
    assert "mount /both: what the container mounts there does not reach the host" in log


def _config_map(v: Volumes) -> None:
    assert v.run(v.one, "cat /config/key") == "old"
    for container in (v.one, v.two):
        v.in_background(container, f"{_TOOL} watch /config", "/watch.log")
        wait_until(lambda: v.run(v.one, "cat /watch.log") == "watching\n", 10, "the watch")
    v.config.write("new")
    for container in (v.one, v.two):
        wait_until(
            lambda: "..data" in v.run(container, "cat /watch.log").split(),  # noqa: B023
            10,
            "an event of the switch",
        )
        assert v.run(container, "cat /config/key") == "new"
    assert v.run(v.one, "ls -a /config").split().count("..v1") == 0


def _nothing_else_is_shared(v: Volumes) -> None:
    record = json.loads(Path("/run/vc/sbs", v.pod, "state.json").read_text())
    # virtiofsd's own root is all that its guest can ever reach.
    share = Path(f"/proc/{record['processes']['virtiofsd'][0]}/root")
    asked_for = set()
    for container in (v.one, v.two):
        spec = v.node.inspect(container)["info"]["runtimeSpec"]
        for mount in spec["mounts"]:
            if mount["type"] == "bind":
                status = os.stat(mount["source"])
                asked_for.add((status.st_dev, status.st_ino))
    names = sorted(path.name for path in share.iterdir())
    roots = [name for name in names if name in (v.one, v.two)]
    assert len(roots) == 2
    for name in names:
        if name in roots:
            assert [path.name for path in (share / name).iterdir()] == ["rootfs"]
        else:
            status = os.stat(share / name)
            assert (status.st_dev, status.st_ino) in asked_for, name
    files = [name for name in names if name.endswith("-wanted")]
    assert [(share / name).is_file() for name in files] == [True], "once for both"


def _many_files(v: Volumes) -> None:
    many = v.root / "dir/many"
    many.mkdir()
    for number in range(10_000):
        (many / f"host{number}").touch()
    assert v.run(v.two, "ls -l /dir/many | grep -c ' host'").strip() == "10000"
    script = "i=0; while [ $i -lt 500 ]; do : > /dir/many/guest$i; i=$((i+1)); done"
    v.run(v.one, script, timeout=120)
    assert v.run(v.two, "ls /dir/many | wc -l").strip() == "10500"
    assert len(os.listdir(many)) == 10_500
