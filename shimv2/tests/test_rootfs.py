# SPDX-License-Identifier: Apache-2.0
"""Root file systems with real mounts, in a mount namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shimv2 import mounts
from shimv2.rootfs import ParsedOptions, Rootfs, RootfsError, compact_lowerdirs


@dataclass
class Mount:
    type: str
    source: str
    options: list[str] = field(default_factory=list)
    target: str = ""


def layer(base: Path, name: str, content: str) -> Path:
    path = base / name
    path.mkdir(parents=True)
    (path / name.replace("/", "_")).write_text(content)
    return path


def loops_on(path: Path) -> str:
    found = subprocess.run(["losetup", "-j", str(path)], capture_output=True, text=True, check=True)
    return found.stdout


def test_overlay_is_mounted_written_and_undone(tmp_path: Path, isolated) -> None:
    def body() -> None:
        low, high = layer(tmp_path, "low", "1"), layer(tmp_path, "high", "2")
        upper, work = tmp_path / "upper", tmp_path / "work"
        upper.mkdir()
        work.mkdir()
        rootfs = Rootfs(tmp_path / "rootfs")
        options = [
            "index=off",
            f"workdir={work}",
            f"upperdir={upper}",
            f"lowerdir={high}:{low}",
        ]
        rootfs.mount([Mount("overlay", "overlay", options)])
        assert sorted(os.listdir(tmp_path / "rootfs")) == ["high", "low"]
        (tmp_path / "rootfs" / "new").touch()
        held = (tmp_path / "rootfs" / "low").open()  # in use, as virtiofsd has it
        rootfs.unmount()
        rootfs.unmount()
        assert not mounts.is_mount_point(tmp_path / "rootfs")
        assert os.listdir(tmp_path / "rootfs") == []
        assert (upper / "new").exists()
        held.close()

    isolated(body)


def test_a_hundred_layers_with_long_paths(tmp_path: Path, isolated) -> None:
    def body() -> None:
        base = tmp_path / ("snapshots-" + "x" * 80)
        layers = [layer(base, f"{n}/fs", "") for n in range(100)]
        options = ["lowerdir=" + ":".join(map(str, layers))]
        assert len(options[0]) > 4096
        before = os.getcwd()
        rootfs = Rootfs(tmp_path / "rootfs")
        rootfs.mount([Mount("overlay", "overlay", options)])
        assert len(os.listdir(tmp_path / "rootfs")) == 100
        assert os.getcwd() == before
        rootfs.unmount()

    isolated(body)


def test_compacting_needs_a_common_directory() -> None:
    assert compact_lowerdirs(["x", "lowerdir=/a/1/fs:/a/22/fs"]) == (
        "/a",
        ["x", "lowerdir=1/fs:22/fs"],
    )
    for same in (
        ["lowerdir=/a"],
        ["lowerdir=/a:/b"],
        ["lowerdir=/a:/a/b"],
        ["x"],
        ["lowerdir=a:b"],
    ):
        assert compact_lowerdirs(same) == (None, same)


def test_bind_recursive_and_read_only(tmp_path: Path, isolated) -> None:
    def body() -> None:
        source = layer(tmp_path, "source", "x")
        (source / "sub").mkdir()
        mounts.mount("t", source / "sub", "tmpfs")
        (source / "sub" / "inner").touch()
        rootfs = Rootfs(tmp_path / "rootfs")
        rootfs.mount([Mount("bind", str(source), ["rbind", "ro", "nosuid"])])
        assert (tmp_path / "rootfs" / "sub" / "inner").exists()
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "rootfs" / "new").touch()
        (source / "new").touch()  # the source itself stays writable
        rootfs.unmount()
        rootfs.mount([Mount("bind", str(source), ["rw"])])
        (tmp_path / "rootfs" / "new2").touch()
        rootfs.unmount()

    isolated(body)


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_a_file_through_a_loop_device_that_goes_away(tmp_path: Path, isolated, kind: str) -> None:
    image = tmp_path / "image"
    layer(tmp_path, "content", "hello")
    if kind == "ext4":
        image.write_bytes(b"")
        os.truncate(image, 4 << 20)
        make = ["mkfs.ext4", "-q", "-d", str(tmp_path / "content"), str(image)]
    else:
        make = ["mkfs.erofs", "--quiet", str(image), str(tmp_path / "content")]
    if subprocess.run(make, capture_output=True, check=False).returncode:
        pytest.skip(f"no mkfs for {kind}")

    def body() -> None:
        if kind not in Path("/proc/filesystems").read_text():
            return
        rootfs = Rootfs(tmp_path / "rootfs")
        for options in (["loop", "ro"], ["ro", "loop", "direct-io"], ["loop"]):
            if kind == "erofs" and "ro" not in options:
                continue
            rootfs.mount([Mount(kind, str(image), options)])
            assert (tmp_path / "rootfs" / "content").read_text() == "hello"
            assert loops_on(image)
            rootfs.unmount()

    isolated(body)
    assert loops_on(image) == ""


def test_a_failed_mount_leaves_no_loop_device(tmp_path: Path, isolated) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))

    def body() -> None:
        with pytest.raises(RootfsError, match="ext4"):
            Rootfs(tmp_path / "rootfs").mount([Mount("ext4", str(image), ["loop"])])

    isolated(body)
    assert loops_on(image) == ""


def test_mounts_in_order_and_undone_when_a_later_one_fails(tmp_path: Path, isolated) -> None:
    def body() -> None:
        rootfs = Rootfs(tmp_path / "rootfs")
        (tmp_path / "other").mkdir()
        good = [Mount("tmpfs", "tmpfs", ["size=1m"]), Mount("bind", str(tmp_path / "other"))]
        rootfs.mount(good)
        rootfs.unmount()
        with pytest.raises(RootfsError) as caught:
            rootfs.mount([*good, Mount("overlay", "overlay", ["lowerdir=/no/such:/nor/this"])])
        text = str(caught.value)
        assert "overlay 'overlay'" in text
        assert "/no/such, /nor/this does not exist" in text
        assert not mounts.is_mount_point(tmp_path / "rootfs")

    isolated(body)


def test_a_target_below_the_rootfs_stays_below_it(tmp_path: Path, isolated) -> None:
    def body() -> None:
        rootfs = Rootfs(tmp_path / "rootfs")
        (tmp_path / "rootfs" / "etc").mkdir(parents=True)
        rootfs.mount([Mount("tmpfs", "tmpfs", [], "/../../etc")])
        assert mounts.is_mount_point(tmp_path / "rootfs" / "etc")
        rootfs.unmount()
        assert not mounts.is_mount_point(tmp_path / "rootfs" / "etc")

    isolated(body)


def test_an_empty_list_means_it_is_in_place(tmp_path: Path) -> None:
    with pytest.raises(RootfsError, match="not a directory"):
        Rootfs(tmp_path / "rootfs").mount([])
    (tmp_path / "rootfs").mkdir()
    Rootfs(tmp_path / "rootfs").mount([])


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (Mount("bind", "/no/such"), "/no/such does not exist"),
        (Mount("nosuchfs", "x"), "nosuchfs"),
        (Mount("erofs", "/x", ["X-containerd.dmverity=/y"]), "X-containerd.dmverity"),
        (Mount("overlay", "overlay", ["uidmap=0:1000:1"]), "uidmap"),
        (Mount("overlay", "overlay", ["lowerdir=" + "/a:" * 4000]), "more than a page"),
        (Mount("fuse.nosuch", "x"), "mount"),
        (Mount("ext4", "/no/such", ["loop"]), "/no/such"),
    ],
)
def test_what_cannot_be_mounted_is_named(tmp_path: Path, isolated, mount, message) -> None:
    def body() -> None:
        with pytest.raises(RootfsError) as caught:
            Rootfs(tmp_path / "rootfs").mount([mount])
        assert message in str(caught.value)

    isolated(body)


def test_options_are_sorted_by_their_reader() -> None:
    options = ParsedOptions(
        ["ro", "rw", "nosuid", "noexec", "exec", "rslave", "loop", "subvolid=5"]
    )
    assert options.flags == mounts.MS_NOSUID
    assert options.propagation == mounts.MS_SLAVE | mounts.MS_REC
    assert options.loop
    assert options.data == ["subvolid=5"]
