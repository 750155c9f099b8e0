# SPDX-License-Identifier: Apache-2.0
"""Lists of mounts as containerd's snapshotters give them: what is a disk, what the host mounts."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shimv2 import mounts
from shimv2.layers import guest_rootfs
from shimv2.mount_manager import Made, plain
from shimv2.rootfs import Rootfs, RootfsError


@dataclass
class Mount:
    type: str
    source: str
    options: list[str] = field(default_factory=list)
    target: str = ""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Four files that could be layers."""
    paths = [tmp_path / f"layer{number}" for number in range(4)]
    for path in paths:
        path.touch()
    return [str(path) for path in paths]


def erofs_in_block_mode(files: list[str]) -> list[Mount]:
    """containerd 2.4, plugins/snapshots/erofs, overlayMounts; mkfs was done by the manager."""
    return [
        Mount("ext4", files[0], ["rw", "loop"]),
        *(Mount("erofs", path, ["ro", "loop"]) for path in files[1:]),
        Mount(
            "format/mkdir/overlay",
            "overlay",
            [
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                "lowerdir={{ overlay 1 3 }}",
            ],
        ),
    ]


def test_a_file_system_on_one_disk(files: list[str]) -> None:
    rootfs = guest_rootfs([Mount("ext4", files[0], ["rw", "loop", "noatime"])])
    assert rootfs is not None
    assert rootfs.top is None
    (layer,) = rootfs.layers
    assert (str(layer.path), layer.fstype, layer.readonly) == (files[0], "ext4", False)
    assert layer.options == ["rw", "noatime"]
    view = guest_rootfs([Mount("erofs", files[0], ["ro"])])
    assert view is not None
    assert view.layers[0].readonly


def test_layers_and_a_writable_one(files: list[str]) -> None:
    rootfs = guest_rootfs(erofs_in_block_mode(files))
    assert rootfs is not None
    assert [layer.readonly for layer in rootfs.layers] == [False, True, True, True]
    overlay = rootfs.overlay(["/rw", "/a", "/b", "/c"])
    assert overlay.type == "overlay"
    assert overlay.options == ["workdir=/rw/work", "upperdir=/rw/upper", "lowerdir=/a:/b:/c"]
    assert overlay.directories == [("/rw/upper", 0o755), ("/rw/work", 0o755)]


def test_a_merged_image_refers_to_further_disks(files: list[str]) -> None:
    devices = [f"device={path}" for path in files[2:]]
    mounts = erofs_in_block_mode(files)
    mounts[1:4] = [Mount("erofs", files[1], ["ro", "loop", *devices])]
    mounts[2].options[-1] = "lowerdir={{ mount 1 }}"
    rootfs = guest_rootfs(mounts)
    assert rootfs is not None
    merged = rootfs.layers[1]
    assert [str(blob) for blob in merged.blobs] == files[2:]
    assert merged.options == ["ro"]


def test_what_the_host_mounts(files: list[str], tmp_path: Path) -> None:
    plain_mode = erofs_in_block_mode(files)[1:]
    plain_mode[-1].options = [
        "workdir=/var/lib/work",
        "upperdir=/var/lib/fs",
        "lowerdir={{ overlay 0 2 }}",
    ]
    nosuch = str(tmp_path / "nosuch")
    for mount_list in (
        [],
        [Mount("overlay", "overlay", ["lowerdir=/a:/b"])],
        [Mount("bind", str(tmp_path), ["rbind"])],
        [Mount("ext4", files[0])],  # a file without `loop`
        [Mount("ext4", str(tmp_path), ["loop"])],
        [Mount("btrfs", files[0], ["loop"])],
        [Mount("ext4", nosuch, ["loop"])],
        [Mount("ext4", files[0], ["loop"], target="/data")],
        plain_mode,
    ):
        assert guest_rootfs(mount_list) is None


def test_verity_is_not_left_out_in_silence(files: list[str]) -> None:
    with pytest.raises(ValueError, match="dmverity"):
        guest_rootfs([Mount("erofs", files[0], ["ro", "X-containerd.dmverity=/x"])])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a{{ mount 1 }}/b", "a/1/b"),
        ("{{source 0}}", "/dev/0"),
        ("{{ overlay 0 2 }}", "/0:/1:/2"),
        ("{{ overlay 2 0 }}", "/2:/1:/0"),
        ("no template", "no template"),
    ],
)
def test_templates(template: str, expected: str) -> None:
    made = [Made(f"/dev/{n}", "", f"/{n}") for n in range(3)]
    assert plain(Mount("format/bind", template), made).source == expected


@pytest.mark.parametrize(
    "spec",
    [
        Mount("format/bind", "{{ mount 3 }}"),
        Mount("format/bind", "{{ mount 0 1 }}"),
        Mount("format/bind", "{{ overlay 1 }}"),
        Mount("format/bind", "{{ exec 0 }}"),
        Mount("mkfs/ext4", "/file"),
        Mount("mkdir/bind", "/x", ["X-containerd.mkdir.path=relative"]),
        Mount("mkdir/bind", "/x", ["X-containerd.mkdir.path=/x:999"]),
        Mount("mkdir/bind", "/x", ["X-containerd.mkdir.path=/x:0700:1000:1000"]),
    ],
)
def test_forms_that_make_no_sense(spec: Mount) -> None:
    with pytest.raises(ValueError, match=r"template|type|option"):
        plain(spec, [Made("", "", f"/{n}") for n in range(3)])


def test_layers_mounted_by_the_host(tmp_path: Path, isolated) -> None:
    images = []
    for name in ("low", "high"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
        images.append(str(tmp_path / f"{name}.erofs"))
        make = ["mkfs.erofs", "--quiet", images[-1], str(tmp_path / name)]
        if subprocess.run(make, capture_output=True, check=False).returncode:
            pytest.skip("no mkfs.erofs")
    bundle = tmp_path / "bundle"
    upper, work = tmp_path / "upper", tmp_path / "work"

    def body() -> None:
        if "erofs" not in Path("/proc/filesystems").read_text():
            return
        for directory in (bundle, upper, work):
            directory.mkdir()
        rootfs = Rootfs(bundle / "rootfs")
        options = [f"upperdir={upper}", f"workdir={work}", "lowerdir={{ overlay 1 0 }}"]
        top = Mount("format/mkdir/overlay", "overlay", options)
        rootfs.mount([*(Mount("erofs", image, ["ro", "loop"]) for image in images), top])
        assert sorted(p.name for p in (bundle / "rootfs").iterdir()) == ["high", "low"]
        (bundle / "rootfs/new").touch()
        rootfs.unmount()
        assert (upper / "new").exists()
        assert not mounts.mount_points_below(bundle)
        assert not (bundle / "layers").exists()
        elsewhere = f"X-containerd.mkdir.path={tmp_path}/elsewhere"
        with pytest.raises(RootfsError, match="elsewhere"):
            rootfs.mount(
                [Mount("erofs", images[0], ["ro", "loop"]), Mount("mkdir/bind", "/", [elsewhere])]
            )
        assert not mounts.mount_points_below(bundle)

    isolated(body)
