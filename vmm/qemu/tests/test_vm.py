# SPDX-License-Identifier: Apache-2.0
"""The driver against real QEMUs."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from vmm.errors import CapacityError, UnsupportedError, VmmConfigError, VmmError, VmmGoneError
from vmm.hypervisor import (
    Accelerator,
    BalloonDevice,
    BlockDevice,
    ConsoleDevice,
    NetDevice,
    RngDevice,
    SerialDevice,
    VmConfig,
)
from vmm.qemu import Qemu

pytestmark = pytest.mark.vm


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_boot_console_metrics_and_stop(vm_config: VmConfig, boot: Any) -> None:
    async with boot(vm_config, RngDevice("rng0")) as (vm, shell):
        status, version = await shell.run("busybox uname -r; false")
        assert status == 1
        assert version[0].isdigit()
        kinds = (await shell.run("busybox cat /sys/bus/virtio/devices/*/device"))[1].split()
        assert sorted(kinds) == ["0x0002", "0x0003", "0x0004"], "disk, console, rng"
        assert vm.version.count(".") == 2
        assert vm.accelerator in (Accelerator.KVM, Accelerator.TCG)
        pid = vm.pid
        metrics = await vm.metrics()
        assert metrics.pids == (pid,)
        assert metrics.vcpus == 1
        assert (await shell.run("busybox nproc"))[1] == "1"
        assert Path(f"/proc/{pid}/task/{metrics.vcpu_threads[0]}").exists()
        assert metrics.rss_bytes > 20 << 20
        assert metrics.cpu_seconds > 0
        await vm.stop()
        assert not alive(pid)
        end = await vm.wait()
        assert (end.reason, end.status) == ("stopped", -signal.SIGKILL)
        assert not vm_config.state_dir.exists()
        with pytest.raises(VmmGoneError):
            _ = vm.pid
        with pytest.raises(VmmGoneError):
            await vm.pause()
        await vm.stop()


async def test_guest_ends_by_itself(vm_config: VmConfig, boot: Any) -> None:
    async with boot(vm_config) as (vm, shell):
        await shell._stream.send_all(b"busybox poweroff -f\n")
        with trio.fail_after(10):
            assert (await vm.wait()).reason == "guest-shutdown"


async def test_guest_panic_is_told_from_a_shutdown(vm_config: VmConfig, boot: Any) -> None:
    async with boot(vm_config) as (vm, shell):
        await shell._stream.send_all(b"exit 3\n")
        with trio.fail_after(10):
            assert (await vm.wait()).reason == "guest-panic"


async def test_killed_vmm_is_reported_to_every_waiter(vm_config: VmConfig, boot: Any) -> None:
    ends = []
    async with boot(vm_config) as (vm, _shell), trio.open_nursery() as nursery:

        async def waiter() -> None:
            ends.append(await vm.wait())

        for _ in range(3):
            nursery.start_soon(waiter)
        os.kill(vm.pid, signal.SIGKILL)
        with trio.fail_after(2):
            await vm.wait()
    assert [end.reason for end in ends] == ["died"] * 3
    assert "SIGKILL" in ends[0].detail


async def test_hotplug_disks(vm_config: VmConfig, boot: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk,with comma"
    path.write_bytes(b"hello disk".ljust(1 << 20, b"\0"))
    async with boot(vm_config) as (vm, shell):
        long_id = "0123456789abcdef" * 4
        where = await vm.add_device(BlockDevice(long_id, path, readonly=True))
        assert where.pci_path == "02/01"
        bus = "/sys/bus/pci/devices/0000:00:02.0"
        script = (
            "until busybox head -c 10 /dev/vdb 2>/dev/null; do busybox usleep 10000; done; "
            f"busybox readlink -f {bus}/*/virtio*/block/vdb"
        )
        status, text = await shell.run(script)
        assert status == 0
        assert text.startswith("hello disk")
        assert ":01.0/" in text, "slot 1 of the bridge, as the path says"
        with pytest.raises(VmmConfigError, match="taken"):
            await vm.add_device(BlockDevice(long_id, path, readonly=True))
        await vm.remove_device(long_id)
        assert (await shell.run("test -b /dev/vdb"))[0] != 0
        assert (await vm.add_device(BlockDevice("again", path))).pci_path == "02/01"
        with pytest.raises(VmmError, match="nosuch"):
            await vm.add_device(BlockDevice("b", tmp_path / "nosuch"))
        with pytest.raises(VmmConfigError, match="no device"):
            await vm.remove_device("b")


async def test_hotplug_scsi_disk(vm_config: VmConfig, boot: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    async with boot(vm_config) as (vm, _shell):
        first = await vm.add_device(BlockDevice("s0", path, driver="virtio-scsi", readonly=True))
        second = await vm.add_device(BlockDevice("s1", path, driver="virtio-scsi", readonly=True))
        assert (first.scsi, second.scsi) == ("0:0", "0:1")


async def test_bridge_full_is_a_capacity_error(
    vm_config: VmConfig, boot: Any, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    async with boot(vm_config) as (vm, _shell):
        for number in range(30):
            await vm.add_device(BlockDevice(f"d{number}", path, readonly=True))
        with pytest.raises(CapacityError, match="30"):
            await vm.add_device(BlockDevice("d30", path, readonly=True))


async def test_refused_device_leaves_nothing(
    vm_config: VmConfig, boot: Any, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    async with boot(vm_config) as (vm, _shell):
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(VmmError):
            await vm.add_device(NetDevice("n0", "no mac", (theirs.fileno(),)))
        nodes = await vm._control.execute("query-named-block-nodes")
        where = await vm.add_device(BlockDevice("n0", path, readonly=True))
        assert where.pci_path == "02/01"
        assert len(await vm._control.execute("query-named-block-nodes")) == len(nodes) + 2


@pytest.fixture
def taps() -> Iterator[list[int]]:
    """Two taps that vanish with their descriptors."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    fds = []
    for number in range(2):
        fd = os.open("/dev/net/tun", os.O_RDWR)
        name = f"vmmtest{number}".encode()
        # linux/if_tun.h: TUNSETIFF with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name, 0x0002 | 0x1000 | 0x4000))
        fds.append(fd)
    yield fds
    for fd in fds:
        os.close(fd)


async def test_network_cards(vm_config: VmConfig, boot: Any, taps: list[int]) -> None:
    first = NetDevice("first", "02:00:00:00:00:01", (taps[0],))
    second = NetDevice("second", "02:00:00:00:00:02", (taps[1],))
    async with boot(vm_config, first) as (vm, shell):
        assert (await shell.run("busybox cat /sys/class/net/eth0/address"))[1] == first.mac
        assert (await vm.add_device(second)).pci_path == "02/01"
        script = (
            "while [ ! -d /sys/class/net/eth1 ]; do busybox usleep 10000; done; "
            "busybox cat /sys/class/net/eth1/address; busybox readlink -f /sys/class/net/eth1"
        )
        address, path = (await shell.run(script))[1].split("\n")
        assert address == second.mac
        assert "/0000:00:02.0/" in path
        await vm.remove_device("second")
        assert (await shell.run("test -d /sys/class/net/eth1"))[0] == 1
        with pytest.raises(UnsupportedError, match="first"):
            await vm.remove_device("first")
        fds = Path(f"/proc/{vm.pid}/fd")
        assert [os.readlink(fd) for fd in fds.iterdir()].count("/dev/net/tun") == 1


async def test_serial_port_and_balloon(vm_config: VmConfig, boot: Any) -> None:
    port = SerialDevice("agent", "agent.channel.0", vm_config.state_dir / "agent.sock")
    async with boot(vm_config, port, BalloonDevice("balloon0")) as (_vm, shell):
        async with await trio.open_unix_socket(str(port.socket)) as stream:
            await shell.run(
                "busybox cat /sys/class/virtio-ports/*/name >/mnt/names; "
                "n=$(busybox grep -l agent /sys/class/virtio-ports/*/name); n=${n%/name}; "
                "echo from guest >/dev/${n##*/}"
            )
            with trio.fail_after(5):
                assert (await stream.receive_some()).strip() == b"from guest"
        assert "agent.channel.0" in (await shell.run("busybox cat /mnt/names"))[1]


async def test_resize_vcpus(vm_config: VmConfig, boot: Any) -> None:
    async with boot(vm_config) as (vm, shell):
        assert await vm.resize_vcpus(2) == 2
        assert (await shell.run("busybox nproc"))[1] == "1"
        cpu1 = "/sys/devices/system/cpu/cpu1"
        status, _ = await shell.run(
            f"while [ ! -d {cpu1} ]; do busybox usleep 10000; done; echo 1 >{cpu1}/online"
        )
        assert status == 0
        assert (await shell.run("busybox grep -c ^processor /proc/cpuinfo"))[1] == "2"
        assert sorted((await vm.metrics()).vcpu_threads) == [0, 1]
        assert await vm.resize_vcpus(1) == (1 if vm.capabilities.vcpu_unplug else 2)
        with pytest.raises(VmmConfigError):
            await vm.resize_vcpus(3)


async def test_resize_memory(vm_config: VmConfig, boot: Any) -> None:
    total = "busybox awk '/MemTotal/{print $2}' /proc/meminfo"
    async with boot(vm_config) as (vm, shell):
        before = int((await shell.run(total))[1])
        assert await vm.resize_memory(200) == 256
        assert await vm.resize_memory(300) == 384
        state = "/sys/devices/system/memory"
        await shell.run(
            f"while [ $(busybox grep -c . {state}/memory*/state | busybox wc -l) -lt 3 ]; do "
            f"busybox usleep 10000; done; for m in {state}/memory*/state; do "
            "busybox grep -q online $m || echo online >$m; done"
        )
        assert int((await shell.run(total))[1]) - before == 128 << 10
        with pytest.raises(CapacityError):
            await vm.resize_memory(2000)


async def test_pause_resume(vm_config: VmConfig, boot: Any) -> None:
    async with boot(vm_config) as (vm, shell):
        await vm.pause()
        with trio.move_on_after(0.3) as scope:
            await shell._stream.send_all(b"echo resumed-$((40+2))\n")
            await shell.read_until(b"resumed-42")
        assert scope.cancelled_caught
        await vm.resume()
        with trio.fail_after(5):
            await shell.read_until(b"resumed-42")


@asynccontextmanager
async def clone_of(
    snapshot: Path, config: VmConfig, state_dir: Path
) -> AsyncIterator[tuple[Qemu, trio.SocketStream]]:
    """A VM that goes on from a snapshot, and its console."""
    console = ConsoleDevice("console0", state_dir / "console.sock")
    async with Qemu(config) as clone:
        await clone.prepare()
        await clone.add_device(console)
        async with await trio.open_unix_socket(str(console.socket)) as stream:
            await clone.restore(snapshot)
            await clone.resume()
            yield clone, stream


async def test_save_and_restore(
    vm_config: VmConfig, boot: Any, shell_on: Any, tmp_path: Path, state_dir: Path
) -> None:
    async with boot(vm_config) as (vm, shell):
        with pytest.raises(VmmError, match="paused"):
            await vm.save(tmp_path)
        await shell.run("echo remembered >/mnt/note")
        await vm.pause()
        await vm.save(tmp_path)
        with trio.move_on_after(0.2) as scope:
            await vm.wait()
        assert scope.cancelled_caught, "the VM is still there"
    memory_file = (tmp_path / "memory").stat()
    assert memory_file.st_size == vm_config.memory_mib << 20
    assert memory_file.st_blocks * 512 < memory_file.st_size, "holes stay holes"
    assert (tmp_path / "state").stat().st_size < 4 << 20, "no memory in it"
    disk = tmp_path / "disk"
    disk.write_bytes(b"plugged into the clone".ljust(1 << 20, b"\0"))
    async with clone_of(tmp_path, vm_config, state_dir) as (clone, stream):
        shell = shell_on(stream)
        assert (await shell.run("busybox cat /mnt/note"))[1] == "remembered"
        assert (await clone.add_device(BlockDevice("d", disk))).pci_path == "02/01"
        script = "until busybox head -c 7 /dev/vdb 2>/dev/null; do busybox usleep 10000; done"
        assert (await shell.run(script))[1] == "plugged"
    assert (tmp_path / "memory").stat().st_mtime_ns == memory_file.st_mtime_ns


async def test_clones_that_map_the_saved_memory(
    vm_config: VmConfig, boot: Any, shell_on: Any, tmp_path: Path, state_dir: Path
) -> None:
    config = replace(vm_config, shared_memory=False, private_memory=True)
    async with boot(config) as (vm, shell):
        with pytest.raises(UnsupportedError, match="balloon"):
            await vm.add_device(BalloonDevice("b"))
        await shell.run("echo remembered >/mnt/note")
        await vm.pause()
        await vm.save(tmp_path)
    before = (tmp_path / "memory").read_bytes()
    for number in range(2):  # what one wrote is not the other's
        async with clone_of(tmp_path, config, state_dir) as (clone, stream):
            shell = shell_on(stream)
            assert (await shell.run("busybox cat /mnt/note"))[1] == "remembered"
            await shell.run(f"echo {number} >/mnt/note; busybox sync")
            assert (await shell.run("busybox cat /mnt/note"))[1] == str(number)
            mapped = Path(f"/proc/{clone.pid}/smaps").read_text()
            kinds = re.findall(rf"\S+ r[-w]-(.) .* {tmp_path}/memory\n", mapped)
            assert set(kinds) == {"p"}
        assert (tmp_path / "memory").read_bytes() == before


@pytest.mark.parametrize("missing", ["state", "memory"])
async def test_restore_from_nothing(vm_config: VmConfig, tmp_path: Path, missing: str) -> None:
    if missing == "state":
        with (tmp_path / "memory").open("wb") as file:
            file.truncate(vm_config.memory_mib << 20)
    async with Qemu(vm_config) as vm:
        await vm.prepare()
        with pytest.raises(VmmError, match=missing):
            await vm.restore(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": Path("/nonexistent/vmlinux")}, "/nonexistent/vmlinux"),
        ({"kernel": Path("/etc/passwd")}, "neither"),
        ({"binary": Path("/nonexistent/qemu")}, "/nonexistent/qemu"),
        ({"binary": Path("/etc/passwd")}, "not executable"),
        ({"image": None}, "image or an initrd"),
        ({"image": Path("/nonexistent/image")}, "guest image"),
        ({"vcpus": 0}, "vCPUs"),
        ({"memory_mib": 1 << 40}, "memory"),
        ({"machine_type": "toaster"}, "toaster"),
    ],
)
async def test_prepare_names_what_is_wrong(
    vm_config: VmConfig, changes: dict[str, Any], message: str
) -> None:
    async with Qemu(replace(vm_config, **changes)) as vm:
        with pytest.raises(VmmConfigError, match=message):
            await vm.prepare()


async def test_start_failure_has_stderr_and_leaves_nothing(vm_config: VmConfig) -> None:
    config = replace(vm_config, cpu_features="+nosuchfeature")
    async with Qemu(config) as vm:
        await vm.prepare()
        await vm.add_device(ConsoleDevice("c", config.state_dir / "console.sock"))
        with pytest.raises(VmmError, match="nosuchfeature"):
            await vm.start()
        assert not config.state_dir.exists()
        assert (await vm.wait()).status == 1


async def test_start_of_another_program(vm_config: VmConfig) -> None:
    async with Qemu(replace(vm_config, binary=Path("/bin/true"))) as vm:
        await vm.prepare()
        with pytest.raises(VmmError, match="status 0"):
            await vm.start()


async def test_cancelled_start_leaves_nothing(vm_config: VmConfig) -> None:
    async with trio.open_nursery() as nursery:

        async def owner() -> None:
            async with Qemu(vm_config) as vm:
                await vm.prepare()
                nursery.start_soon(watch, vm)
                await vm.start()

        async def watch(vm: Qemu) -> None:
            while vm._process is None or not vm._process.started:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
            pids.append(vm.pid)

        pids: list[int] = []
        nursery.start_soon(owner)
    assert not alive(pids[0])


async def test_body_exception_passes_unchanged(vm_config: VmConfig) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with Qemu(vm_config) as vm:
            await vm.prepare()
            await vm.start()
            pid = vm.pid
            raise ValueError("mine")
    assert not alive(pid)


def test_vmm_dies_with_its_parent(vm_config: VmConfig, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, trio
        from pathlib import Path
        from vmm.hypervisor import VmConfig
        from vmm.qemu import Qemu

        async def main():
            config = VmConfig(id="orphan", state_dir=Path(sys.argv[1]), binary=Path(sys.argv[2]),
                              kernel=Path(sys.argv[3]), image=Path(sys.argv[4]), memory_mib=256)
            async with Qemu(config) as vm:
                await vm.prepare()
                await vm.start()
                print(vm.pid, flush=True)
                await trio.sleep_forever()

        trio.run(main)
        """
    )
    config = vm_config
    arguments = [config.state_dir, config.binary, config.kernel, config.image]
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    async def ended() -> None:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(pidfd)

    trio.run(ended)
    os.close(pidfd)
    config.state_dir.rmdir()
