# SPDX-License-Identifier: Apache-2.0
"""virtiofsd: command lines, life, and what a guest sees."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from vmm.errors import VmmConfigError
from vmm.hypervisor import FsDevice, VmConfig
from vmm.virtiofsd import Flavor, Virtiofsd, command_line, detect_flavor

CACHE = Path(os.environ.get("PYKATA_CACHE", Path.home() / ".cache" / "pykata"))
BINARIES = {
    Flavor.C: Path("/usr/lib/qemu/virtiofsd"),
    Flavor.RUST: CACHE / "virtiofsd" / "virtiofsd",
}


@pytest.fixture(params=list(Flavor), ids=lambda flavor: flavor.value)
def binary(request: pytest.FixtureRequest) -> Path:
    path = BINARIES[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    return path


@pytest.fixture
def here() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fsd-", dir="/tmp"))
    (path / "shared").mkdir()
    yield path
    subprocess.run(["umount", "-R", path / "shared" / "b"], check=False, capture_output=True)
    subprocess.run(["umount", "-R", path / "shared" / "a"], check=False, capture_output=True)
    shutil.rmtree(path)


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    return children + [grandchild for child in children for grandchild in descendants(child)]


def test_command_lines() -> None:
    shared = Path("/srv/shared")
    rust = command_line(Flavor.RUST, Path("/v"), shared, 7, "never", ["--thread-pool-size=1"])
    assert rust[:2] == ["/v", "--fd=7"]
    assert {"--shared-dir=/srv/shared", "--cache=never", "--announce-submounts", "--xattr"} <= {
        *rust
    }
    assert rust[-1] == "--thread-pool-size=1"
    c = command_line(Flavor.C, Path("/v"), shared, 7, "never")
    assert c[-1] == "source=/srv/shared,cache=none,announce_submounts,xattr,sandbox=namespace"
    with pytest.raises(VmmConfigError, match="metadata"):
        command_line(Flavor.C, Path("/v"), shared, 7, "metadata")
    with pytest.raises(VmmConfigError, match="sometimes"):
        command_line(Flavor.RUST, Path("/v"), shared, 7, "sometimes")


def test_flavor_of_real_programs(binary: Path) -> None:
    assert BINARIES[detect_flavor(binary)] == binary


@pytest.mark.parametrize(
    ("text", "flavor"),
    [("virtiofsd version 7.2.0", Flavor.C), ("virtiofsd 1.10.0", Flavor.RUST)],
)
def test_flavor_of_a_wrapper_script(tmp_path: Path, text: str, flavor: Flavor) -> None:
    script = tmp_path / "wrapper"
    script.write_text(f"#!/bin/sh\necho '{text}'\n")
    script.chmod(0o755)
    assert detect_flavor(script) is flavor


def test_another_program_is_refused() -> None:
    with pytest.raises(VmmConfigError, match="no virtiofsd"):
        detect_flavor(Path("/bin/true"))


async def test_bad_option_ends_with_stderr(binary: Path, here: Path) -> None:
    async with Virtiofsd(
        binary, here / "shared", here / "fs.sock", extra_args=["--nosuch"]
    ) as daemon:
        await daemon.start()
        with trio.fail_after(5):
            assert "nosuch" in await daemon.wait()
    assert not (here / "fs.sock").exists()


async def test_kill_leaves_no_process_and_no_socket(binary: Path, here: Path) -> None:
    async with Virtiofsd(binary, here / "shared", here / "fs.sock") as daemon:
        await daemon.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(here / "fs.sock"))
            with trio.fail_after(5):
                while not (family := descendants(daemon.pid)):
                    await trio.sleep(0.01)
            family.append(daemon.pid)
            await daemon.stop()
    with trio.fail_after(5):
        while any(Path(f"/proc/{pid}").exists() for pid in family):
            await trio.sleep(0.01)
    assert not (here / "fs.sock").exists()


async def test_missing_directory_is_named(binary: Path, here: Path) -> None:
    async with Virtiofsd(binary, here / "nosuch", here / "fs.sock") as daemon:
        with pytest.raises(VmmConfigError, match="nosuch"):
            await daemon.start()


MOUNT = "busybox mkdir -p /mnt/s; busybox mount -t virtiofs kataShared /mnt/s"

MMAP = (
    "python3 -c \"import mmap; f=open('/mnt/s/map','r+b'); m=mmap.mmap(f.fileno(),4096); "
    "m[0:5]=b'guest'; m.flush(); print(m[5:9])\""
)

# Each open file takes a descriptor in virtiofsd and each inode known to the guest another, and
# the hard limit may be as low as 20,000: many descriptors on fewer files.
OPEN_MANY = (
    'python3 -c "import os,resource; resource.setrlimit(resource.RLIMIT_NOFILE,(11000,11000)); '
    "fs=[os.open(f'/mnt/s/many/{i%1000}',0) for i in range(10000)]; "
    'print(len(fs), os.read(fs[9999],9).decode())"'
)


@pytest.mark.vm
@pytest.mark.slow
async def test_share_in_a_guest(binary: Path, here: Path, vm_config: VmConfig, boot: Any) -> None:
    """Cold-plugged share: data, shared mmap, submounts with equal inodes, many open files."""
    shared = here / "shared"
    (shared / "map").write_bytes(b"x" * 5 + b"host" + bytes(4087))
    for name in "ab":
        (shared / name).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "t", shared / name], check=True)
        (shared / name / "same").write_text(name)
    assert (shared / "a" / "same").stat().st_ino == (shared / "b" / "same").stat().st_ino
    (shared / "many").mkdir()
    for number in range(1000):
        (shared / "many" / str(number)).write_text(str(number))
    device = FsDevice("shared", "kataShared", here / "fs.sock")
    async with Virtiofsd(binary, shared, device.socket) as daemon:
        await daemon.start()
        async with boot(vm_config, device) as (_vm, shell):
            assert (await shell.run(MOUNT))[0] == 0
            assert (await shell.run("busybox cat /mnt/s/a/same /mnt/s/b/same"))[1] == "ab"
            assert (await shell.run(MMAP))[1] == "b'host'"
            assert (shared / "map").read_bytes()[:9] == b"guesthost"
            await shell.run("echo hello >/mnt/s/new")
            assert (shared / "new").read_text() == "hello\n"
            assert (await shell.run(OPEN_MANY, timeout=300))[1] == "10000 999"


@pytest.mark.vm
async def test_share_plugged_later(
    binary: Path, here: Path, vm_config: VmConfig, boot: Any
) -> None:
    """Hot-plugged on a root port, and gone again."""
    (here / "shared" / "file").write_text("from host")
    device = FsDevice("shared", "kataShared", here / "fs.sock")
    async with Virtiofsd(binary, here / "shared", device.socket) as daemon:
        await daemon.start()
        async with boot(vm_config) as (vm, shell):
            assert (await vm.add_device(device)).pci_path == "04/00"
            status, text = await shell.run(
                f"until {MOUNT} 2>/dev/null; do busybox usleep 10000; done; busybox cat /mnt/s/file"
            )
            assert (status, text) == (0, "from host")
            assert (await shell.run("busybox umount /mnt/s"))[0] == 0
            await vm.remove_device("shared")
            with trio.fail_after(5):
                await daemon.wait()
