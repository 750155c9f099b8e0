# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import mounts, storage, waiting
from agent.api import agent_pb2
from ttrpc.errors import Code, RpcError

Run = Callable[..., Any]


def _attach(storages: storage.Storages, container: str = "", **fields: Any) -> str:
    return waiting.run(storages.attach(agent_pb2.Storage(**fields), container))


def _options(point: str) -> set[str]:
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        fields = line.split(" ")
        if fields[1] == point:
            return set(fields[3].split(","))
    raise AssertionError(f"{point} is not mounted")


def test_tmpfs_options_are_honoured(tmp_path: Path, namespaces: Run) -> None:
    point = str(tmp_path / "a/shm")

    def child() -> tuple[Any, ...]:
        storages = storage.Storages()
        _attach(
            storages,
            driver="ephemeral",
            source="shm",
            fstype="tmpfs",
            options=["rbind", "noexec", "nosuid", "nodev", "mode=1777", "size=65536k", "fsgid=77"],
            mount_point=point,
        )
        status = os.stat(point)
        seen = (_options(point), os.statvfs(point), stat.S_IMODE(status.st_mode), status.st_gid)
        storages.update_ephemeral(
            [
                agent_pb2.Storage(
                    driver="ephemeral",
                    fstype="tmpfs",
                    mount_point=point,
                    options=["remount,size=1M"],
                )
            ]
        )
        resized = os.statvfs(point)
        storages.detach(point)
        kept = mounts.is_mount_point(point)
        failures = storages.detach_all()
        return (*seen, resized, kept, failures, os.path.exists(point))

    options, size, mode, group, resized, kept, failures, there = namespaces(child)
    assert {"noexec", "nosuid", "nodev"} <= options
    assert size.f_blocks * size.f_frsize == 64 << 20
    assert mode == 0o3777
    assert group == 77
    assert resized.f_blocks * resized.f_frsize == 1 << 20
    assert kept  # an emptydir outlives its containers
    assert failures == []
    assert not there


def test_refused_tmpfs_option_is_named(tmp_path: Path, namespaces: Run) -> None:
    def child() -> tuple[Code, str, list[str]]:
        storages = storage.Storages()
        with pytest.raises(RpcError) as caught:
            _attach(storages, driver="ephemeral", mount_point=f"{tmp_path}/x", options=["sizes=1"])
        return caught.value.code, caught.value.message, os.listdir(tmp_path)

    code, message, left = namespaces(child)
    assert code == Code.INVALID_ARGUMENT
    assert "sizes=1" in message
    assert left == []


def test_reference_counts(tmp_path: Path, namespaces: Run) -> None:
    source = tmp_path / "source"
    source.mkdir()
    point = str(tmp_path / "point")

    def child() -> list[bool]:
        storages = storage.Storages()
        request = {
            "driver": "bind",
            "source": str(source),
            "mount_point": point,
            "options": ["rbind", "ro", "rprivate"],
        }
        _attach(storages, **request)
        _attach(storages, **request)
        assert "ro" in _options(point)
        storages.detach(point)
        first = mounts.is_mount_point(point)
        storages.detach(point)
        storages.detach(point)
        return [first, mounts.is_mount_point(point), os.path.exists(point)]

    assert namespaces(child) == [True, False, False]
    assert source.is_dir()


def test_bind_of_a_file(tmp_path: Path, namespaces: Run) -> None:
    source = tmp_path / "hosts"
    source.write_text("127.0.0.1 localhost\n")
    point = tmp_path / "deep/er/hosts"

    def child() -> tuple[str, bool]:
        storages = storage.Storages()
        _attach(storages, driver="bind", source=str(source), mount_point=str(point))
        text = point.read_text()
        storages.detach(str(point))
        return text, point.exists()

    assert namespaces(child) == ("127.0.0.1 localhost\n", False)


def test_shared_storage_stays_until_the_sandbox_ends(tmp_path: Path, namespaces: Run) -> None:
    def child() -> list[bool]:
        point = f"{tmp_path}/point"
        storages = storage.Storages()
        _attach(storages, driver="bind", source="/tmp", mount_point=point, shared=True)
        storages.detach(point)
        kept = mounts.is_mount_point(point)
        storages.detach_all()
        return [kept, mounts.is_mount_point(point)]

    assert namespaces(child) == [True, False]


def test_local(tmp_path: Path, namespaces: Run) -> None:
    point = tmp_path / "local/dir"

    def child() -> tuple[int, int, bool]:
        storages = storage.Storages()
        _attach(
            storages,
            driver="local",
            source="local",
            fstype="local",
            options=["mode=0777", "fsgid=5"],
            mount_point=str(point),
        )
        status = point.stat()
        (point / "file").write_text("x")
        storages.detach_all()
        return stat.S_IMODE(status.st_mode), status.st_gid, point.exists()

    assert namespaces(child) == (0o2777, 5, False)


def test_overlay(tmp_path: Path, namespaces: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.setattr(storage, "BUNDLES", str(tmp_path / "run"))
    point = tmp_path / "rootfs"

    def child() -> list[str]:
        # overlayfs refuses an upper directory on overlayfs, which a test machine's /tmp may be
        mounts.mount("tmpfs", _made(tmp_path / "run"), "tmpfs")
        storages = storage.Storages()
        _attach(
            storages,
            "c1",
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            options=[f"lowerdir={tmp_path}/one:{tmp_path}/two", storage.OVERLAY_RW],
            driver_options=[f"{storage.CREATE_DIRECTORY}={tmp_path}/run/made"],
            mount_point=str(point),
        )
        (point / "new").touch()
        found = sorted(os.listdir(point))
        found += sorted(os.listdir(tmp_path / "run/c1/upper"))
        found += sorted(os.listdir(tmp_path / "run"))
        storages.detach(str(point))
        found += os.listdir(tmp_path / "run/c1")
        return [*found, str(mounts.is_mount_point(str(point)))]

    assert namespaces(child) == ["new", "one", "two", "new", "c1", "made", "False"]


def test_remove_tree_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/f").touch()
    (tree / "a/link").symlink_to(outside)
    storage.remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "kept").exists()


def _made(path: Path) -> str:
    path.mkdir(exist_ok=True)
    return str(path)


def test_one_that_fails_gives_back_those_before(tmp_path: Path, namespaces: Run) -> None:
    def child() -> tuple[Code, str, list[str], list[str]]:
        storages = storage.Storages(hotplug_timeout=0.05)
        requests = [
            agent_pb2.Storage(driver="bind", source="/tmp", mount_point=f"{tmp_path}/a"),
            agent_pb2.Storage(driver="mmioblk", source="/dev/none", mount_point=f"{tmp_path}/b"),
        ]
        with pytest.raises(RpcError) as caught:
            waiting.run(storages.attach_all(requests))
        return (
            caught.value.code,
            caught.value.message,
            storages.mount_points(),
            os.listdir(tmp_path),
        )

    code, message, points, left = namespaces(child)
    assert code == Code.DEADLINE_EXCEEDED
    assert "/dev/none" in message
    assert points == []
    assert left == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"driver": "nonsense", "mount_point": "/x/y"}, Code.INVALID_ARGUMENT),
        ({"driver": "image_guest_pull", "mount_point": "/x/y"}, Code.UNIMPLEMENTED),
        ({"driver": "bind", "mount_point": "x"}, Code.INVALID_ARGUMENT),
        ({"driver": "blk", "source": "7", "mount_point": "/x/y"}, Code.INVALID_ARGUMENT),
        ({"driver": "scsi", "source": "0-1", "mount_point": "/x/y"}, Code.INVALID_ARGUMENT),
        ({"driver": "nvdimm", "source": "pmem0", "mount_point": "/x/y"}, Code.INVALID_ARGUMENT),
        (
            {"driver": "local", "mount_point": "/tmp", "options": ["mode=99"]},
            Code.INVALID_ARGUMENT,
        ),
        (
            {"driver": "ephemeral", "mount_point": "/x/y", "fstype": "hugetlbfs"},
            Code.INVALID_ARGUMENT,
        ),
    ],
)
def test_bad_requests(fields: dict[str, Any], code: Code, tmp_path: Path) -> None:
    if fields["mount_point"].startswith("/"):
        fields = {**fields, "mount_point": f"{tmp_path}{fields['mount_point']}"}
    storages = storage.Storages()
    with pytest.raises(RpcError) as caught:
        _attach(storages, **fields)
    assert caught.value.code == code
    assert storages.mount_points() == []


def test_block_device_appears_later(tmp_path: Path) -> None:
    """The mount of a disk waits for its node; other requests for it wait with it."""
    dev = tmp_path / "dev"
    dev.mkdir()
    storages = storage.Storages(sysfs=str(tmp_path / "sys"), dev=str(dev))
    request = agent_pb2.Storage(
        driver="blk", source="02/03", mount_point=f"{tmp_path}/point", fstype="ext4"
    )
    first = storages.attach(request)
    step = next(first)
    assert isinstance(step, waiting.Wait)
    assert not step.ready()
    second = storages.attach(request)
    other = next(second)
    assert isinstance(other, waiting.Wait)
    assert not other.ready()
    bridge = tmp_path / "sys/devices/pci0000:00/0000:00:02.0"
    (bridge / "pci_bus/0000:05").mkdir(parents=True)
    assert not step.ready()
    (bridge / "0000:05:03.0/virtio4/block/vdq").mkdir(parents=True)
    assert not step.ready()
    (dev / "vdq").touch()
    assert step.ready()
    with pytest.raises(RpcError) as caught:  # the node is no disk, so the mount fails
        first.send(None)
    assert caught.value.code == Code.INTERNAL
    assert other.ready()
    with pytest.raises(RpcError, match="another request"):
        second.send(None)
    assert storages.mount_points() == []


def test_a_file_system_on_several_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dev, sysfs = tmp_path / "dev", tmp_path / "sys"
    dev.mkdir()
    for number in (1, 2):
        (dev / f"vd{number}").touch()
        device = sysfs / f"devices/pci0000:00/0000:00:0{number}.0"
        (device / f"virtio{number}/block/vd{number}").mkdir(parents=True)
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        storage.mounts,
        "mount",
        lambda source, point, fstype, options: seen.append((source, options)),
    )
    monkeypatch.setattr(storage.mounts, "unmount", lambda point: None)
    storages = storage.Storages(sysfs=str(sysfs), dev=str(dev))
    point = _attach(
        storages,
        driver="blk",
        source="01",
        fstype="erofs",
        options=["ro"],
        driver_options=[f"{storage.EXTRA_DEVICE}=02"],
        mount_point=f"{tmp_path}/point",
    )
    assert seen == [(f"{dev}/vd1", ["ro", f"device={dev}/vd2"])]
    (step,) = list(storages.flush([point, "/other"]))
    assert isinstance(step, waiting.Command)
    assert step.argv == [storage.SYNC, "-f", point]
    assert len(list(storages.flush())) == 1
    storages.detach(point)
    assert list(storages.flush()) == []


def test_fs_group(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "d").mkdir(mode=0o700)
    (tmp_path / "d/f").touch(mode=0o600)
    (tmp_path / "d/link").symlink_to("/etc/passwd")
    before = os.stat("/etc/passwd")
    waiting.run(storage._apply_fs_group(str(tmp_path), 1234, 0, False))
    status = (tmp_path / "d/f").stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 0o660)
    status = (tmp_path / "d").stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 0o2770)
    assert (tmp_path / "d/link").lstat().st_gid == 1234
    assert os.stat("/etc/passwd").st_gid == before.st_gid
    os.chown(tmp_path / "d/f", 0, 0)
    waiting.run(storage._apply_fs_group(str(tmp_path), 1234, 1, False))
    assert (tmp_path / "d/f").stat().st_gid == 0  # the root matched: left alone


def test_hugepages(tmp_path: Path) -> None:
    control = tmp_path / "kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    control.parent.mkdir(parents=True)
    control.write_text("3")
    storage._reserve_hugepages(["pagesize=2M", "size=8388608"], str(tmp_path))
    assert control.read_text() == "7"
    with pytest.raises(RpcError, match="pagesize=1Gi"):
        storage._reserve_hugepages(["pagesize=1Gi,size=1073741824"], str(tmp_path))


def test_watchable_follows_its_source(tmp_path: Path, namespaces: Run) -> None:
    source = tmp_path / "config"
    (source / "..v1").mkdir(parents=True)
    (source / "..v1/key").write_text("one")
    (source / "..data").symlink_to("..v1")
    (source / "key").symlink_to("..data/key")
    point = tmp_path / "point"

    def child() -> list[Any]:
        from agent import watchable

        watchable.COPIES = str(tmp_path / "copies")
        storages = storage.Storages()
        assert storages.next_poll() is None
        _attach(
            storages,
            driver="watchable-bind",
            source=str(source),
            mount_point=str(point),
            options=["ro"],
        )
        assert storages.next_poll() is not None
        seen = [(point / "key").read_text()]
        (source / "..v2").mkdir()
        (source / "..v2/key").write_text("two")
        (source / "..new").symlink_to("..v2")
        (source / "..new").rename(source / "..data")
        (source / "..v1/key").unlink()
        (source / "..v1").rmdir()
        storages._watchers._next = time.monotonic()  # type: ignore[union-attr]
        storages.poll()
        seen += [
            (point / "key").read_text(),
            sorted(os.listdir(point)),
            "ro" in _options(str(point)),
        ]
        storages.detach(str(point))
        seen += [storages.next_poll(), point.exists(), (tmp_path / "copies").exists()]
        return seen

    assert namespaces(child) == ["one", "two", ["..data", "..v2", "key"], True, None, False, False]


def test_too_big_to_watch_is_a_plain_bind(tmp_path: Path, namespaces: Run) -> None:
    source = tmp_path / "big"
    source.mkdir()
    for index in range(17):
        (source / str(index)).touch()

    def child() -> tuple[int, float | None]:
        storages = storage.Storages()
        point = f"{tmp_path}/point"
        _attach(storages, driver="watchable-bind", source=str(source), mount_point=point)
        (source / "late").touch()
        count = len(os.listdir(point))
        poll = storages.next_poll()
        storages.detach_all()
        return count, poll

    assert namespaces(child) == (18, None)
