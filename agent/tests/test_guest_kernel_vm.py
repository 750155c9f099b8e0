# SPDX-License-Identifier: Apache-2.0
"""The agent as PID 1 of a real guest: mounts, disks, network, hot-plug, over virtio-serial.

PYKATA_GUEST names another folder with `vmlinux` and `kata-containers.img` than build/guest.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.api import agent_pb2, health_pb2, types_pb2
from ttrpc.client import Client
from ttrpc.errors import Code, RpcError

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(os.environ.get("PYKATA_GUEST", ROOT / "build/guest"))
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
MAC = "02:00:00:00:00:77"
SHARE = "/run/kata-containers/shared/containers"
BOOT_TIMEOUT = 90.0  # an emulated guest on a machine that does other things too

pytestmark = [
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (GUEST / "vmlinux").exists() or shutil.which("qemu-system-x86_64") is None,
        reason="needs the guest image and QEMU",
    ),
    pytest.mark.skipif(not VIRTIOFSD.exists(), reason="needs QEMU 7's virtiofsd"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


class Guest:
    """A running VM: stubs of the agent's services, and QMP by hand."""

    def __init__(self, agent: Any, health: Any, qmp: socket.socket, share: Path) -> None:
        self.agent = agent
        self.health = health
        self.share = share
        self._qmp = qmp.makefile("rw", encoding="utf-8")
        self._qmp.readline()  # the greeting
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            if "event" in answer:
                continue
            assert "return" in answer, answer
            return answer["return"]


def _disk(path: Path, name: str) -> str:
    tree = path.with_suffix(".tree")
    tree.mkdir()
    (tree / name).write_text(f"{name} on a disk\n")
    command = ["mkfs.ext4", "-q", "-F", "-d", str(tree), str(path), "8M"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(path)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    share = tmp_path / "share"
    share.mkdir()
    (share / "greeting").write_text("hello from the host\n")
    cold, hot = (_disk(tmp_path / f"{name}.img", name) for name in ("cold", "hot"))
    fs_socket, agent_socket, qmp_socket = (tmp_path / f"{n}.sock" for n in ("fs", "agent", "qmp"))
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with open(tmp_path / f"{Path(command[0]).name}.log", "wb") as log:
            processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    words = (
        "root=/dev/vda1 rootfstype=erofs ro console=hvc0 quiet panic=1 mitigations=off "
        "agent.server_addr=serial://agent.channel.0 agent.hotplug_timeout=10 agent.log=debug "
        "systemd.unified_cgroup_hierarchy=1"
    )
    try:
        start(
            str(VIRTIOFSD),
            f"--socket-path={fs_socket}",
            "-o",
            f"source={share}",
            "-o",
            "sandbox=chroot",
        )
        await _until(fs_socket.exists)
        start(
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
            "-M", "q35,accel=tcg,memory-backend=mem", "-cpu", "max", "-smp", "1,maxcpus=2",
            "-m", "512,slots=2,maxmem=2G",
            "-object", "memory-backend-memfd,id=mem,size=512M,share=on",
            "-kernel", str(GUEST / "vmlinux"), "-append", words,
            "-drive", f"id=img,file={GUEST}/kata-containers.img,format=raw,if=none,readonly=on",
            "-device", "virtio-blk-pci,drive=img,romfile=,addr=4",
            "-drive", f"id=cold,file={cold},format=raw,if=none", "-device", "virtio-blk-pci,drive=cold,romfile=,addr=5",
            "-drive", f"id=hot,file={hot},format=raw,if=none",
            "-device", "pcie-root-port,id=port0,chassis=1,slot=1,addr=6",
            "-device", "pcie-root-port,id=port1,chassis=2,slot=2,addr=7",
            "-device", "virtio-serial-pci,romfile=", "-chardev", f"file,id=c0,path={tmp_path}/console",
            "-device", "virtconsole,chardev=c0",
            "-chardev", f"socket,id=a0,path={agent_socket},server=on,wait=off",
            "-device", "virtserialport,chardev=a0,name=agent.channel.0",
            "-chardev", f"socket,id=fs0,path={fs_socket}",
            "-device", "vhost-user-fs-pci,chardev=fs0,tag=kataShared",
            "-netdev", "user,id=n0,restrict=on", "-device", f"virtio-net-pci,netdev=n0,mac={MAC},romfile=,addr=9",
            "-device", "virtio-rng-pci,romfile=",
            "-qmp", f"unix:{qmp_socket},server=on,wait=off",
        )  # fmt: skip
        await _until(qmp_socket.exists)
        await _until(agent_socket.exists)
        qmp = socket.socket(socket.AF_UNIX)
        qmp.connect(str(qmp_socket))
        stream = await trio.open_unix_socket(str(agent_socket))
        async with Client(stream) as client:
            agent = client.stub(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
            health = client.stub(health_pb2.DESCRIPTOR.services_by_name["Health"])
            try:
                await health.Check(health_pb2.CheckRequest(), timeout=BOOT_TIMEOUT)
            except RpcError as error:
                pytest.fail(f"{error}\n{(tmp_path / 'console').read_text()[-4000:]}")
            yield Guest(agent, health, qmp, share)
        qmp.close()
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


async def _until(condition: Any, timeout: float = 10.0) -> None:
    with trio.fail_after(timeout):
        while not condition():
            await trio.sleep(0.02)


async def test_the_guest_kernel_side(guest: Guest, tmp_path: Path) -> None:
    """One boot for all of it: a boot is what takes the time."""
    await _storages(guest)
    await _network(guest)
    await _copy(guest)
    await _hotplug(guest)
    await _figures(guest)
    await _the_rest(guest)
    console = (tmp_path / "console").read_text()
    assert "Traceback" not in console, console[-4000:]


async def _storages(guest: Guest) -> None:
    request = agent_pb2.CreateSandboxRequest(
        hostname="pod-1", dns=["nameserver 10.0.0.2"], sandbox_id="s1"
    )
    request.storages.add(
        driver="virtio-fs", source="kataShared", fstype="virtiofs", mount_point=SHARE
    )
    request.storages.add(
        driver="ephemeral",
        source="shm",
        fstype="tmpfs",
        options=["noexec", "nosuid", "nodev", "mode=1777", "size=1048576"],
        mount_point="/run/kata-containers/sandbox/shm",
    )
    request.storages.add(
        driver="blk",
        source="05",
        fstype="ext4",
        mount_point="/run/kata-containers/sandbox/storage/a",
    )
    await guest.agent.CreateSandbox(request, timeout=30)
    shm = await _volume(guest, "/run/kata-containers/sandbox/shm")
    assert shm.total == 1 << 20
    disk = await _volume(guest, "/run/kata-containers/sandbox/storage/a")
    assert 4 << 20 < disk.total < 8 << 20
    update = agent_pb2.UpdateEphemeralMountsRequest()
    update.storages.add(
        driver="ephemeral",
        source="tmpfs",
        fstype="tmpfs",
        options=["remount,size=2M"],
        mount_point="/run/kata-containers/sandbox/shm",
    )
    await guest.agent.UpdateEphemeralMounts(update, timeout=30)
    assert (await _volume(guest, "/run/kata-containers/sandbox/shm")).total == 2 << 20
    with pytest.raises(RpcError) as caught:
        await guest.agent.GetVolumeStats(
            agent_pb2.VolumeStatsRequest(volume_guest_path="/nowhere"), timeout=30
        )
    assert caught.value.code == Code.NOT_FOUND


async def _volume(guest: Guest, path: str) -> Any:
    request = agent_pb2.VolumeStatsRequest(volume_guest_path=path)
    return (await guest.agent.GetVolumeStats(request, timeout=30)).usage[0]


async def _network(guest: Guest) -> None:
    wanted = types_pb2.Interface(name="eth0", devicePath="09", mtu=1400, hwAddr=MAC)
    wanted.IPAddresses.add(address="10.1.2.3", mask="24")
    wanted.IPAddresses.add(family=types_pb2.v6, address="fd00::3", mask="64")
    request = agent_pb2.UpdateInterfaceRequest(interface=wanted)
    got = await guest.agent.UpdateInterface(request, timeout=30)
    assert (got.name, got.mtu, got.hwAddr) == ("eth0", 1400, MAC)
    routes = agent_pb2.Routes()
    routes.Routes.add(gateway="10.1.2.1", device="eth0")
    routes.Routes.add(gateway="fd00::1", device="eth0", family=types_pb2.v6)
    found = await guest.agent.UpdateRoutes(agent_pb2.UpdateRoutesRequest(routes=routes), timeout=30)
    assert {"10.1.2.1", "fd00::1"} <= {route.gateway for route in found.Routes}
    neighbors = agent_pb2.ARPNeighbors()
    neighbors.ARPNeighbors.add(
        toIPAddress=types_pb2.IPAddress(address="10.1.2.1"),
        device="eth0",
        lladdr="02:00:00:00:00:01",
        state=0x80,
    )
    await guest.agent.AddARPNeighbors(
        agent_pb2.AddARPNeighborsRequest(neighbors=neighbors), timeout=30
    )
    listed = await guest.agent.ListInterfaces(agent_pb2.ListInterfacesRequest(), timeout=30)
    links = {item.name: item for item in listed.Interfaces}
    assert {"lo", "eth0"} <= set(links)
    assert links["lo"].raw_flags & 1, "the loopback interface is up"


async def _copy(guest: Guest) -> None:
    assert (guest.share / "greeting").exists()
    request = agent_pb2.CopyFileRequest(
        path=f"{SHARE}/c1/file", file_size=5, file_mode=0o100640, dir_mode=0o750, data=b"12345"
    )
    await guest.agent.CopyFile(request, timeout=30)
    # through the agent, virtio-fs and virtiofsd back to this machine
    assert (guest.share / "c1/file").read_bytes() == b"12345"


async def _hotplug(guest: Guest) -> None:
    storage = agent_pb2.CreateContainerRequest(container_id="c1")
    storage.storages.add(
        driver="blk", source="06/00", fstype="ext4", mount_point="/run/kata-containers/hot"
    )
    # A container with an impossible root: what its storages needed was attached and given back.
    storage.OCI.Root.Path = "/nowhere"
    async with trio.open_nursery() as nursery:

        async def create() -> None:
            with pytest.raises(RpcError) as caught:
                await guest.agent.CreateContainer(storage, timeout=60)
            assert caught.value.code == Code.INTERNAL, caught.value
            assert "blk" not in caught.value.message, caught.value

        nursery.start_soon(create)
        await trio.sleep(0.3)  # the agent is waiting by now: what it must do is notice
        guest.qmp("device_add", driver="virtio-blk-pci", drive="hot", id="hot0", bus="port0")
    with pytest.raises(RpcError):
        await _volume(guest, "/run/kata-containers/hot")
    swap = agent_pb2.AddSwapRequest(PCIPath=[0x1E])
    started = time.monotonic()
    with pytest.raises(RpcError) as caught:
        await guest.agent.AddSwap(swap, timeout=60)
    assert caught.value.code == Code.DEADLINE_EXCEEDED
    assert time.monotonic() - started > 8


async def _figures(guest: Guest) -> None:
    details = await guest.agent.GetGuestDetails(
        agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True), timeout=30
    )
    assert details.agent_details.init_daemon
    text = (await guest.agent.GetMetrics(agent_pb2.GetMetricsRequest(), timeout=30)).metrics
    assert 'kata_guest_netdev_stat{interface="eth0",item="recv_bytes"}' in text
    assert 'mount="/run/kata-containers/sandbox/shm"' in text
    if details.mem_block_size_bytes:
        before = _total(text)
        guest.qmp("object-add", **{"qom-type": "memory-backend-ram", "id": "m1", "size": 256 << 20})
        guest.qmp("device_add", driver="pc-dimm", id="d1", memdev="m1")
        with trio.fail_after(30):
            after = before
            while after < before + (200 << 20):
                await guest.agent.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(), timeout=30)
                reply = await guest.agent.GetMetrics(agent_pb2.GetMetricsRequest(), timeout=30)
                after = _total(reply.metrics)


def _total(text: str) -> int:
    (line,) = [line for line in text.splitlines() if 'meminfo{item="mem_total"}' in line]
    return int(line.split()[1])


async def _the_rest(guest: Guest) -> None:
    await guest.agent.ReseedRandomDev(
        agent_pb2.ReseedRandomDevRequest(data=os.urandom(512)), timeout=30
    )
    for offset in (0.2, 100.0, 0.0):
        now = time.time() + offset
        request = agent_pb2.SetGuestDateTimeRequest(Sec=int(now), Usec=int(now % 1 * 1e6))
        await guest.agent.SetGuestDateTime(request, timeout=30)
    try:
        rules = await guest.agent.GetIPTables(agent_pb2.GetIPTablesRequest(), timeout=30)
    except RpcError as error:
        assert error.code in (Code.UNIMPLEMENTED, Code.INTERNAL)
    else:
        assert isinstance(rules.data, bytes)
    await guest.agent.DestroySandbox(agent_pb2.DestroySandboxRequest(), timeout=30)
    with pytest.raises(RpcError):
        usage = await _volume(guest, "/run/kata-containers/sandbox/storage/a")
        assert usage.total > 8 << 20  # the root's, if the empty directory is still there
        raise RpcError(Code.NOT_FOUND, "unmounted")
