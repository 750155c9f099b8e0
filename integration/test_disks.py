# SPDX-License-Identifier: Apache-2.0
"""Root file systems and volumes that are disks of the VM: plugged, mounted by the guest, gone.

containerd 2.4 only, since 1.6 has neither the blockfile nor the erofs snapshotter; its VMs are
clones of a template, but for the one with SCSI disks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import edition_named
from integration.lib.bundles import spec, unpack_busybox, write
from integration.lib.configuration import Configuration, installed
from integration.lib.containerd import RUNTIME, Containerd, CtrError
from integration.lib.disks import (
    direct_volume,
    ext4,
    loop_device,
    mounted,
    record,
    total_bytes,
)
from integration.lib.images import Image, busybox_layer, layer_of, oci_archive
from integration.lib.kata import Kata, wait_until
from integration.lib.leftovers import left_by
from shimv2 import direct_volumes

_LAYERS = 3
_IMAGE = "localhost/layers:latest"
_MIB = 1 << 20
_DISKS = "grep -c -E '(vd|sd)[b-z]+$' /proc/partitions || true"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Below /run: templates and sockets need short paths."""
    with tempfile.TemporaryDirectory(prefix=Kata.mark, dir="/run") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def disk_containerd(prefix: Path, place: Path) -> Iterator[Containerd]:
    """With an image of several layers unpacked for each snapshotter."""
    scratch = ext4(place / "scratch.img", 32 * _MIB)
    archive = oci_archive(
        place / "layers.tar",
        _IMAGE,
        Image([busybox_layer(), *(layer_of({f"layer{n}": b"x"}) for n in range(1, _LAYERS))]),
    )
    configuration = installed(prefix)
    daemon = Containerd(
        edition_named("go"),
        shim_path=[prefix / "bin"],
        environment={"KATA_CONF_FILE": str(configuration)},
        extra_config=f"""
[plugins."io.containerd.snapshotter.v1.blockfile"]
  scratch_file = "{scratch}"
  root_path = "{place}/blockfile"
  fs_type = "ext4"
[plugins."io.containerd.snapshotter.v1.erofs"]
  default_size = "32M"
""",
    )
    with daemon:
        for snapshotter in ("overlayfs", "native", "blockfile", "erofs"):
            daemon.ctr("images", "import", "--local", "--snapshotter", snapshotter, archive)
        yield daemon


@pytest.fixture
def disks(disk_containerd: Containerd) -> Iterator[Kata]:
    """Runs containers of the image of several layers; what they leave behind fails the test."""
    kata = Kata(disk_containerd, image=_IMAGE)
    yield kata
    kata.close()
    left = left_by(kata.mark)
    assert not left, f"left behind: {left}"


def _snapshot_file(place: Path) -> Path:
    """The newest of the blockfile snapshotter's."""
    return max((place / "blockfile/snapshots").iterdir(), key=lambda path: path.stat().st_mtime)


def test_a_root_file_system_of_one_disk(disks: Kata, place: Path, tmp_path: Path) -> None:
    flags = ("--snapshotter", "blockfile")
    container = disks.start("sh", "-c", "mount | grep ' / '; echo kept > /kept", flags=flags)
    wait_until(lambda: disks.status(container) == "STOPPED", 10, "it has ended")
    disks.delete(container)
    file = _snapshot_file(place)
    state = subprocess.run(["dumpe2fs", "-h", file], capture_output=True, text=True, check=True)
    assert "needs_recovery" not in state.stdout, "the guest has unmounted it"
    with mounted(file, tmp_path / "m", "-o", "ro,loop") as point:
        assert (point / "kept").read_text() == "kept\n"


def test_layers_are_shared_by_the_containers_of_a_pod(disks: Kata) -> None:
    flags = ("--snapshotter", "erofs")
    with disks.pod() as pod:
        one = pod.start("sleep", "1000", flags=flags)
        two = pod.start("sleep", "1000", flags=flags)
        assert " / type overlay" not in disks.execute(one, "cat", "/proc/partitions").stdout
        assert "layer2" in disks.execute(two, "ls", "/").stdout
        assert disks.execute(two, "sh", "-c", _DISKS).stdout.strip() == str(_LAYERS + 2)
        disks.execute(one, "sh", "-c", "echo one > /own; rm /layer1")
        assert disks.execute(two, "ls", "/own", check=False).returncode
        assert disks.execute(two, "cat", "/layer1").stdout == "x"
        disks.remove(one)
        assert disks.execute(two, "sh", "-c", _DISKS).stdout.strip() == str(_LAYERS + 1)
        assert disks.execute(two, "cat", "/layer2").stdout == "x"
        three = pod.start("cat", "/layer1", flags=flags)
        wait_until(lambda: disks.status(three) == "STOPPED", 10, "a third finds its layers")
        assert disks.delete(three) == 0


def test_layers_that_the_host_mounts(disks: Kata, prefix: Path, tmp_path: Path) -> None:
    """`disable_block_device_use`: loop devices in the shim's mount namespace, gone with it."""
    configuration = Configuration(prefix, tmp_path)
    configuration.set("hypervisor.qemu", disable_block_device_use=True)
    done = disks.run(
        *("sh", "-c", f"cat /layer1 /layer2; touch /new; rm /layer1; {_DISKS}"),
        flags=(*configuration.flags, "--snapshotter", "erofs"),
    )
    assert done.stdout == "xx0\n"
    snapshots = str(disks.containerd.directory)
    used = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True).stdout
    assert snapshots not in used


def test_an_image_of_which_only_the_directories_are_merged(
    disk_containerd: Containerd, disks: Kata, tmp_path: Path
) -> None:
    """Its metadata refers to its layer's data by a further disk.  mkfs.erofs of Debian 12 can't
    merge layers, so containerd's snapshot is exchanged for one that is made likewise."""
    reference = "localhost/merged:latest"
    image = Image([busybox_layer({"merged": b"yes"})])
    archive = oci_archive(tmp_path / "merged.tar", reference, image)
    disk_containerd.ctr("images", "import", "--local", "--snapshotter", "erofs", archive)
    root = disk_containerd.directory / "root/io.containerd.snapshotter.v1.erofs/snapshots"
    # Numbered; one that is being removed has no layer any more.
    snapshot = max((path.parent for path in root.glob("*/layer.erofs")), key=lambda p: int(p.name))
    tree = unpack_busybox(tmp_path)
    (tree / "merged").write_text("yes")
    data, metadata = tmp_path / "data", tmp_path / "metadata"
    data.touch()
    make = [
        "mkfs.erofs",
        "--quiet",
        "--chunksize=4096",
        f"--blobdev={data}",
        str(metadata),
        str(tree),
    ]
    subprocess.run(make, check=True, capture_output=True)
    shutil.copy(data, snapshot / "layer.erofs")
    shutil.copy(metadata, snapshot / "fsmeta.erofs")
    done = disks.ctr(
        *("run", "--rm", "--runtime", RUNTIME, "--snapshotter", "erofs", reference),
        *(disks.new_id(), "sh", "-c", f"cat /merged; {_DISKS}"),
    )
    assert done.stdout == "yes3\n", "the writable layer, metadata and data"


def test_a_block_device_of_a_container(disks: Kata, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"hello disk".ljust(4 * _MIB, b"\0"))
    script = (
        "head -c 10 /dev/xvda; echo; "
        "echo written | dd of=/dev/xvda bs=4096 seek=1 conv=fsync 2>/dev/null; "
        "mknod /dev/root b 254 0; cat /dev/root; "  # the guest's own: the rules forbid it
        "grep vdb$ /proc/partitions; stat -c %t:%T /dev/xvda; "
        "cat $(find /sys/fs/cgroup -name io.max); cat /proc/uptime; "
        "dd if=/dev/xvda of=/dev/null bs=4096 count=300 iflag=direct; cat /proc/uptime; exit 0"
    )
    with loop_device(image) as device:
        number = os.stat(device).st_rdev
        numbers = {"major": os.major(number), "minor": os.minor(number)}
        mknod = {
            kind: ["CAP_MKNOD", "CAP_DAC_OVERRIDE"]
            for kind in ("bounding", "effective", "permitted")
        }
        document = spec(
            unpack_busybox(tmp_path),
            *("sh", "-c", script),
            process={"capabilities": mknod},
            linux={
                "devices": [{"path": "/dev/xvda", "type": "b", **numbers}],
                "resources": {
                    "devices": [
                        {"allow": False, "access": "rwm"},
                        {"allow": True, "type": "b", **numbers, "access": "rw"},
                        {"allow": True, "type": "b", "access": "m"},
                    ],
                    "blockIO": {"throttleReadIOPSDevice": [{**numbers, "rate": 123}]},
                },
            },
        )
        document["mounts"].append(
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}
        )
        config = write(tmp_path / "config.json", document)
        done = disks.ctr("run", "--rm", "--runtime", RUNTIME, "--config", config, disks.new_id())
    assert done.stdout.startswith("hello disk\n")
    assert "4096 vdb" in done.stdout
    assert "fe:10" in done.stdout, "the guest's numbers"
    assert "riops=123" in done.stdout
    before, after = (float(line.split()[0]) for line in done.stdout.splitlines()[-2:])
    assert after - before > 1.8, "300 reads at 123 a second"
    assert "can't open '/dev/root': Operation not permitted" in done.stderr
    assert image.read_bytes()[4096:4103] == b"written"


def test_a_privileged_container_has_no_disk_of_the_host(disks: Kata) -> None:
    """Nor one of its own: the native snapshotter's directory is shared."""
    script = f"cat /layer1 /layer2; grep -c ' / virtiofs rw' /proc/mounts; {_DISKS}"
    done = disks.run(
        *("sh", "-c", f"{script}; ls /dev | grep -c loop"),
        flags=("--privileged", "--snapshotter", "native"),
        check=False,
    )
    root, plugged, loops = done.stdout.split()
    assert (root, plugged) == ("xx1", "0")
    # Of all that it lists only the node of the control device, which is no disk, is there.
    assert int(loops) <= 1


def test_scsi_disks_with_limits(disks: Kata, prefix: Path, tmp_path: Path) -> None:
    scsi = Configuration(prefix, tmp_path)
    scsi.set("factory", enable_template=False)  # a VM that boots can be plugged as well
    scsi.set(
        "hypervisor.qemu",
        block_device_driver="virtio-scsi",
        block_device_aio="io_uring",  # as Kata's own files have it
        disk_rate_limiter_bw_max_rate=4 * _MIB * 8,
    )
    image = tmp_path / "image"
    image.write_bytes(bytes(16 * _MIB))
    with loop_device(image) as device:
        mount = ("--mount", f"type=bind,src={device},dst=/dev/volume,options=rbind:rw")
        script = (
            "ls /sys/block; cat /proc/uptime; "
            "dd if=/dev/volume of=/dev/null bs=1M count=12 iflag=direct; cat /proc/uptime"
        )
        done = disks.run("sh", "-c", script, flags=(*scsi.flags, "--snapshotter", "erofs", *mount))
    names = done.stdout.split()
    assert [f"sd{letter}" for letter in "abcde"] == [n for n in names if n.startswith("sd")]
    before, after = (float(line.split()[0]) for line in done.stdout.splitlines()[-2:])
    # The bucket holds a tenth of a second more.
    assert after - before > 2.5, "12 MiB at 4 MiB a second"


def test_a_guest_with_which_nothing_is_shared(disks: Kata, prefix: Path, tmp_path: Path) -> None:
    """Its root is a virtio-blk disk, limited by the VMM."""
    none = Configuration(prefix, tmp_path)
    none.set("hypervisor.qemu", shared_fs="none", disk_rate_limiter_ops_max_rate=150)
    volume = tmp_path / "volume"
    (volume / "sub").mkdir(parents=True)
    (volume / "sub/file").write_text("copied")
    mount = ("--mount", f"type=bind,src={volume},dst=/data,options=rbind:rw")
    script = (
        "cat /data/sub/file; touch /data/new; grep -c virtiofs /proc/mounts; cat /proc/uptime; "
        "dd if=/bin/busybox of=/dev/null bs=4096 count=400 iflag=direct; cat /proc/uptime"
    )
    done = disks.run(
        *("sh", "-c", script),
        flags=(*none.flags, "--snapshotter", "blockfile", *mount),
        check=False,
    )
    said, before, after = done.stdout.splitlines()
    assert said == "copied0"
    assert float(after.split()[0]) - float(before.split()[0]) > 2, "400 reads at 150 a second"
    assert not (volume / "new").exists()
    with pytest.raises(CtrError, match=r"is no disk.*shared_fs"):
        disks.run("true", flags=none.flags)


def test_a_direct_volume(disks: Kata, prefix: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    image = ext4(tmp_path / "image", 16 * _MIB)
    path = ("--volume-path", str(volume))
    info = record(image, metadata={"fsGroup": "1234"}, options=["noatime"])
    direct_volume(prefix, "add", *path, "--mount-info", info)
    try:
        mount = ("--mount", f"type=bind,src={volume},dst=/data,options=rbind:rw")
        container = disks.start("sleep", "1000", flags=mount)
        disks.execute(container, "sh", "-c", "echo in the guest > /data/file")
        assert disks.execute(container, "stat", "-c", "%g", "/data").stdout == "1234\n"
        assert "noatime" in disks.execute(container, "grep", " /data ", "/proc/mounts").stdout
        assert list(volume.iterdir()) == [], "the host has not mounted it"

        before = total_bytes(prefix, volume)
        assert 8 * _MIB < before < 16 * _MIB
        with image.open("r+b") as file:
            file.truncate(48 * _MIB)
        direct_volume(prefix, "resize", *path, "--size", str(48 * _MIB))
        assert total_bytes(prefix, volume) > before + 24 * _MIB
        disks.ctr("task", "kill", "-s", "9", container)
        wait_until(lambda: disks.status(container) == "STOPPED", 10, "it has ended")
        disks.delete(container)
    finally:
        direct_volume(prefix, "remove", *path)
    with mounted(image, tmp_path / "m", "-o", "ro,loop") as point:
        assert (point / "file").read_text() == "in the guest\n"


def test_more_disks_than_places(disks: Kata, tmp_path: Path) -> None:
    flags: tuple[str, ...] = ()
    volumes = [tmp_path / f"v{number}" for number in range(31)]
    try:
        for number, volume in enumerate(volumes):
            image = tmp_path / f"image{number}"
            image.write_bytes(bytes(_MIB))
            volume.mkdir()
            direct_volumes.add(str(volume), record(image))
            flags += ("--mount", f"type=bind,src={volume},dst=/v{number},options=rbind:rw")
        with disks.pod() as pod:
            with pytest.raises(CtrError, match=r"no PCI slot left.*virtio-scsi"):
                pod.start("true", flags=flags)
            member = pod.start("sh", "-c", f"test $({_DISKS}) = 0")
            wait_until(lambda: disks.status(member) == "STOPPED", 10, "it has ended")
            assert disks.delete(member) == 0, "all of them are unplugged again"
        assert not [user for volume in volumes for user in direct_volumes.users(str(volume))]
    finally:
        for volume in volumes:
            direct_volumes.remove(str(volume))
