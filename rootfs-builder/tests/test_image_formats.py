# SPDX-License-Identifier: Apache-2.0
"""MBR, cpio and bzImage: the byte formats."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from guestbuild import bzimage, cpio, mbr


def test_mbr_has_one_linux_partition_at_one_mebibyte() -> None:
    table = mbr.table(48 << 20)
    assert len(table) == 512
    assert table[510:] == b"\x55\xaa"
    _, _, kind, _, start, count = struct.unpack_from("<B3sB3sII", table, 446)
    assert (kind, start * 512, count * 512) == (0x83, 1 << 20, 48 << 20)
    assert table[462:510] == bytes(48), "partitions 2 to 4 are empty"


@pytest.mark.parametrize("size", [0, -512, 511, 512 << 32])
def test_mbr_refuses_sizes_it_cannot_hold(size: int) -> None:
    with pytest.raises(ValueError, match="not a partition's size"):
        mbr.table(size)


def test_wrapped_file_system_is_padded_to_mebibytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 16
    (tmp_path / "fs").write_bytes(content)
    mbr.wrap(tmp_path / "fs", tmp_path / "img")
    data = (tmp_path / "img").read_bytes()
    assert len(data) == 2 << 20
    assert data[1 << 20 :].startswith(content)
    assert not any(data[(1 << 20) + len(content) :])
    assert data[:512] == mbr.table(1 << 20)


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="sfdisk is not installed")
def test_partitioning_tools_read_it(tmp_path: Path) -> None:
    (tmp_path / "fs").write_bytes(bytes(3 << 20))
    mbr.wrap(tmp_path / "fs", tmp_path / "img")
    dump = subprocess.run(
        ["sfdisk", "--dump", tmp_path / "img"], capture_output=True, text=True, check=True
    ).stdout
    assert "start=        2048, size=        6144, type=83" in dump


def make_tree(root: Path) -> None:
    (root / "bin").mkdir(parents=True)
    (root / "bin/sh").write_bytes(b"#!shell")
    (root / "bin/sh").chmod(0o755)
    (root / "etc").mkdir(mode=0o700)
    (root / "etc/empty").touch()
    (root / "link").symlink_to("bin/sh")


def pack(root: Path) -> bytes:
    stream = io.BytesIO()
    archive = cpio.Writer(stream)
    archive.tree(root)
    archive.device("console", 5, 1)
    archive.close()
    return stream.getvalue()


def test_cpio_holds_a_tree(tmp_path: Path) -> None:
    make_tree(tmp_path / "root")
    members = {name: (mode, data) for name, mode, data in cpio.names(pack(tmp_path / "root"))}
    assert list(members) == ["bin", "bin/sh", "etc", "etc/empty", "link", "console"]
    assert members["bin/sh"] == (0o100755, b"#!shell")
    assert members["etc"][0] == 0o40700
    assert members["link"] == (0o120777, b"bin/sh")
    assert members["console"][0] == 0o20600


def test_cpio_is_the_same_each_time(tmp_path: Path) -> None:
    make_tree(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    (tmp_path / "two/etc/empty").touch()
    assert pack(tmp_path / "one") == pack(tmp_path / "two")


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_program_reads_it(tmp_path: Path) -> None:
    make_tree(tmp_path / "root")
    listing = subprocess.run(
        ["cpio", "-t", "--quiet"], input=pack(tmp_path / "root"), capture_output=True, check=True
    )
    assert listing.stdout.decode().split()[:2] == ["bin", "bin/sh"]


@pytest.mark.parametrize("cut", [1, 50, 120, 200])
def test_cpio_cut_short_is_an_error(tmp_path: Path, cut: int) -> None:
    make_tree(tmp_path / "root")
    data = pack(tmp_path / "root")
    with pytest.raises(ValueError, match=r"cpio member|cut short"):
        list(cpio.names(data[: len(data) - cut]))


def bz_image(payload: bytes) -> bytes:
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x20F)
    struct.pack_into("<II", setup, 0x248, 100, len(payload))
    return bytes(setup) + bytes(100) + payload + b"more"


ELF = b"\x7fELF" + bytes(5000)
SIZE = struct.pack("<I", len(ELF))


@pytest.mark.parametrize(
    "payload",
    [ELF, gzip.compress(ELF) + SIZE, lzma.compress(ELF) + SIZE],
    ids=["plain", "gz", "xz"],
)
def test_kernel_is_taken_out_of_a_bzimage(payload: bytes) -> None:
    assert bzimage.vmlinux(bz_image(payload)) == ELF


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1000),
        bz_image(b"???? unknown"),
        bz_image(ELF)[:3000],
        bz_image(gzip.compress(b"x") + SIZE),
    ],
)
def test_what_is_no_kernel_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        bzimage.vmlinux(data)
