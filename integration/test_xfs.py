# SPDX-License-Identifier: Apache-2.0
"""xfs on disks of the VM: two copies of one root file system, and a volume that grows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import edition_named
from integration.lib.configuration import installed
from integration.lib.containerd import Containerd
from integration.lib.disks import direct_volume, mounted, record, total_bytes, xfs
from integration.lib.images import busybox_image
from integration.lib.kata import Kata, wait_until
from integration.lib.leftovers import left_by

_MIB = 1 << 20
_FLAGS = ("--snapshotter", "blockfile")


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=Kata.mark, dir="/run") as name:
        yield Path(name)


@pytest.fixture
def kata(prefix: Path, place: Path) -> Iterator[Kata]:
    """With a snapshotter whose files are xfs; copies have the UUID of the first."""
    daemon = Containerd(
        edition_named("go"),
        shim_path=[prefix / "bin"],
        environment={"KATA_CONF_FILE": str(installed(prefix))},
        extra_config=f"""
[plugins."io.containerd.snapshotter.v1.blockfile"]
  scratch_file = "{xfs(place / "scratch.img")}"
  root_path = "{place}/blockfile"
  fs_type = "xfs"
  mount_options = ["loop", "nouuid"]
""",
    )
    with daemon:
        daemon.ctr("images", "import", "--local", *_FLAGS, busybox_image())
        kata = Kata(daemon)
        yield kata
        kata.close()
        left = left_by(kata.mark)
        assert not left, f"left behind: {left}"


def test_root_file_systems_and_a_volume(
    kata: Kata, prefix: Path, place: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    image = xfs(tmp_path / "image")
    path = ("--volume-path", str(volume))
    direct_volume(prefix, "add", *path, "--mount-info", record(image, "xfs"))
    try:
        with kata.pod(flags=_FLAGS) as pod:
            other = pod.start("sleep", "1000", flags=_FLAGS)
            assert " / xfs rw" in kata.execute(other, "cat", "/proc/mounts").stdout
            before_it = set((place / "blockfile/snapshots").iterdir())
            mount = ("--mount", f"type=bind,src={volume},dst=/data,options=rbind:rw")
            member = pod.start("sleep", "1000", flags=(*_FLAGS, *mount))
            assert " / xfs rw" in kata.execute(member, "cat", "/proc/mounts").stdout
            assert " /data xfs rw" in kata.execute(member, "cat", "/proc/mounts").stdout
            kata.execute(member, "sh", "-c", "echo kept > /kept; echo in the guest > /data/file")
            before = total_bytes(prefix, volume)
            with image.open("r+b") as file:
                file.truncate(96 * _MIB)
            direct_volume(prefix, "resize", *path, "--size", str(96 * _MIB))
            assert total_bytes(prefix, volume) > before + 56 * _MIB
            (root,) = set((place / "blockfile/snapshots").iterdir()) - before_it
            kata.ctr("task", "kill", "-s", "9", member)
            wait_until(lambda: kata.status(member) == "STOPPED", 10, "it has ended")
            kata.delete(member)
            # Without a replay of the log there is only what a clean unmount has written.
            clean = ("-o", "ro,loop,norecovery,nouuid")
            with mounted(root, tmp_path / "m", *clean) as point:
                assert (point / "kept").read_text() == "kept\n"
            with mounted(image, tmp_path / "m", *clean) as point:
                assert (point / "file").read_text() == "in the guest\n"
    finally:
        direct_volume(prefix, "remove", *path)
