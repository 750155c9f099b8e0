# SPDX-License-Identifier: Apache-2.0
"""Root file systems and volumes through virtio-fs."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.lib import programs
from integration.lib.images import cache_dir
from integration.lib.kata import Kata
from integration.lib.templates import Templates

RUST_VIRTIOFSD = cache_dir() / "virtiofsd/virtiofsd"


def bind(source: Path, destination: str, options: str = "rbind:rw") -> tuple[str, str]:
    """Flags of `ctr run` for a volume."""
    return ("--mount", f"type=bind,src={source},dst={destination},options={options}")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    directory = tmp_path / "volume"
    directory.mkdir()
    return directory


def test_what_a_container_writes_is_on_the_host(kata: Kata, volume: Path) -> None:
    (volume / "from-host").write_text("host")
    script = (
        "cat /v/from-host; echo guest > /v/from-guest; chown 1000:100 /v/from-guest; ln -s a /v/l"
    )
    assert kata.run("sh", "-c", script, flags=bind(volume, "/v")).stdout == "host"
    written = volume / "from-guest"
    assert written.read_text() == "guest\n"
    assert (written.stat().st_uid, written.stat().st_gid) == (1000, 100)
    assert os.readlink(volume / "l") == "a"


def test_a_read_only_volume_is_read_only(kata: Kata, volume: Path) -> None:
    done = kata.run(
        "sh", "-c", "echo x > /v/new", flags=bind(volume, "/v", "rbind:ro"), check=False
    )
    assert done.returncode != 0
    assert "Read-only" in done.stderr
    assert not list(volume.iterdir())


def test_a_file_volume_shows_that_file_only(kata: Kata, volume: Path) -> None:
    (volume / "wanted").write_text("wanted")
    (volume / "secret").write_text("secret")
    container_id = kata.start("sleep", "1000", flags=bind(volume / "wanted", "/etc/wanted"))
    assert kata.execute(container_id, "cat", "/etc/wanted").stdout == "wanted"
    pid = kata.pid_of(container_id, "virtiofsd")
    # virtiofsd's own root is all that its guest can ever reach.
    root = Path(f"/proc/{pid}/root")
    names = sorted(entry.name for entry in root.iterdir())
    assert [name.startswith(container_id) for name in names] == [True] * len(names)
    files = [name for name in names if (root / name).is_file()]
    assert len(files) == 1
    assert (root / files[0]).read_text() == "wanted"


def test_a_link_in_a_volume_does_not_lead_out_on_the_host(kata: Kata, volume: Path) -> None:
    secret = volume.parent / "secret"
    secret.write_text("secret")
    (volume / "link").symlink_to(secret)
    (volume / "up").symlink_to("../secret")
    done = kata.run("cat", "/v/up", flags=bind(volume, "/v"), check=False)
    assert done.returncode != 0
    done = kata.run("cat", "/v/link", flags=bind(volume, "/v"), check=False)
    assert done.returncode != 0


def test_shared_mmap(kata: Kata, volume: Path) -> None:
    program = programs.build("shared-mmap", programs.SHARED_MMAP)
    flags = (*bind(program, "/shared-mmap", "rbind:ro"), *bind(volume, "/v"))
    assert kata.run("/shared-mmap", "/v/file", flags=flags).stdout == "same\n"
    assert (volume / "file").read_bytes()[4096:4100] == b"seen"


def test_ten_thousand_open_files(kata: Kata, volume: Path) -> None:
    program = programs.build("open-files", programs.OPEN_FILES)
    flags = (
        *("--cap-add", "CAP_SYS_RESOURCE"),
        *(*bind(program, "/open-files", "rbind:ro"), *bind(volume, "/v")),
    )
    # virtiofsd holds a descriptor for each open file and each name; its hard limit may be 20,000.
    assert kata.run("/open-files", "/v", "10000", "4000", flags=flags).stdout == "10000\n"
    assert len(list(volume.iterdir())) == 4000


def test_modes_times_and_holes(kata: Kata, volume: Path) -> None:
    script = (
        "cd /v; touch -t 202001020304.05 old; chmod 4711 old; truncate -s 1G hole;"
        " mkfifo pipe; mkdir -m 1777 dir; ln old hard; stat -c '%a %Y %h' old"
    )
    out = kata.run("sh", "-c", script, flags=bind(volume, "/v")).stdout
    assert out.split()[0::2] == ["4711", "2"]
    hole = (volume / "hole").stat()
    assert (hole.st_size, hole.st_blocks) == (1 << 30, 0)
    assert stat.S_ISFIFO((volume / "pipe").stat().st_mode)
    assert stat.S_IMODE((volume / "dir").stat().st_mode) == 0o1777


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[list[Path]]:
    """Files of two host file systems, alike in inode number, not in what they hold."""
    files = []
    try:
        for name in ("one", "two"):
            directory = tmp_path / name
            directory.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
            files.append(directory / "name")
            files[-1].write_text(f"{name}\n")
        assert files[0].stat().st_ino == files[1].stat().st_ino
        yield files
    finally:
        for file in files:
            subprocess.run(["umount", "-l", file.parent], check=True)


def test_equal_inode_numbers_are_two_files(kata: Kata, twins: list[Path]) -> None:
    """In two containers, and in one that has both."""
    volumes = [bind(file.parent, f"/{file.parent.name}") for file in twins]
    with kata.pod() as pod:
        one = pod.start("sleep", "1000", flags=volumes[0])
        two = pod.start("sleep", "1000", flags=volumes[1])
        both = pod.start("sleep", "1000", flags=(*volumes[0], *volumes[1]))
        assert kata.execute(one, "cat", "/one/name").stdout == "one\n"
        assert kata.execute(two, "cat", "/two/name").stdout == "two\n"
        seen = kata.execute(both, "stat", "-c", "%d:%i", "/one/name", "/two/name").stdout.split()
        assert len(set(seen)) == 2, "programs take them for one file"
        kata.execute(one, "sh", "-c", "echo changed > /one/name")
        assert kata.execute(both, "cat", "/one/name", "/two/name").stdout == "changed\ntwo\n"
        assert [file.read_text() for file in twins] == ["changed\n", "two\n"]


@pytest.mark.one_edition
def test_the_virtiofsd_in_rust_serves_too(kata: Kata, volume: Path, templates: Templates) -> None:
    """Debian 12 has the one in C; with newer releases, and Kata's packages, comes this one."""
    if not RUST_VIRTIOFSD.exists():
        pytest.skip(f"{RUST_VIRTIOFSD} is not there: run `make virtiofsd`")
    templates.set("factory", enable_template=False)
    templates.set(
        "hypervisor.qemu", virtio_fs_daemon=str(RUST_VIRTIOFSD), virtio_fs_cache="metadata"
    )
    script = (
        "dd if=/dev/urandom of=/v/data bs=1M count=8 2>/dev/null; ln /v/data /v/b; sha256sum /v/b"
    )
    flags = (*bind(volume, "/v"), *templates.flags)
    container = kata.start("sleep", "1000", flags=flags)
    told = kata.execute(container, "sh", "-c", script).stdout.split()[0]
    assert hashlib.sha256((volume / "data").read_bytes()).hexdigest() == told
    command = Path(f"/proc/{kata.pid_of(container, 'virtiofsd')}/cmdline").read_text()
    assert str(RUST_VIRTIOFSD.parent) in command
    assert "--cache=metadata" in command
