# SPDX-License-Identifier: Apache-2.0
"""A pod's network against the real kernel, with a stand-in for the VM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from google.protobuf.message import Message

from shimv2.namespaces import call_inside, new_network_namespace
from shimv2.network.pod_network import NetworkSettings, PodNetwork
from ttrpc.errors import Code, RpcError
from vmm.errors import CapacityError
from vmm.hypervisor import Device, DeviceAddress, NetDevice

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun"
)


class Vm:
    """Holds NICs as a VMM does, and notes what the agent is told."""

    def __init__(self) -> None:
        self.nics: dict[str, tuple[NetDevice, list[int]]] = {}
        self.calls: list[tuple[str, Any]] = []
        self.failures: list[Exception] = []
        self.told = trio.Event()

    async def add_device(self, device: Device) -> DeviceAddress:
        if self.failures:
            raise self.failures.pop()
        assert isinstance(device, NetDevice)
        self.nics[device.id] = (device, [os.dup(fd) for fd in device.tap_fds])
        return DeviceAddress(pci_path=f"02/{len(self.nics):02x}")

    async def remove_device(self, device_id: str) -> None:
        for fd in self.nics.pop(device_id)[1]:
            os.close(fd)

    async def call(self, method: str, request: Message) -> Any:
        if self.failures:
            raise self.failures.pop()
        self.calls.append((method, request))
        self.told.set()

    def close(self) -> None:
        for _, fds in self.nics.values():
            for fd in fds:
                os.close(fd)
        self.nics.clear()

    async def wait_told(self, method: str) -> Any:
        """The next request of a kind; those before it are forgotten."""
        with trio.fail_after(10):
            while True:
                while self.calls:
                    name, request = self.calls.pop(0)
                    if name == method:
                        return request
                self.told = trio.Event()
                await self.told.wait()


class Netns:
    """A network namespace with one end of a veth pair in it, as CNI leaves it."""

    def __init__(self) -> None:
        self.fd = new_network_namespace()
        self.ip("link", "add", "eth0", "mtu", "1400", "type", "veth", "peer", "name", "host0")
        self.ip("address", "add", "10.1.0.2/24", "dev", "eth0")
        self.ip("address", "add", "fd01::2/64", "dev", "eth0", "nodad")
        self.ip("link", "set", "host0", "up")
        self.ip("link", "set", "eth0", "up")
        self.ip("route", "add", "default", "via", "10.1.0.1")
        self.ip("route", "add", "10.9.0.0/16", "via", "10.1.0.9", "metric", "7", "mtu", "1300")
        self.ip("route", "add", "192.0.2.1", "dev", "eth0", "src", "10.1.0.2")
        self.ip("neighbour", "add", "10.1.0.1", "lladdr", "02:00:00:00:00:99", "dev", "eth0")
        self.ip("link", "set", "host0", "down")
        self.ip("link", "set", "host0", "up")

    def ip(self, *command: str) -> str:
        return self._run("ip", *command)

    def links(self) -> dict[str, Any]:
        return {link["ifname"]: link for link in json.loads(self.ip("-json", "-d", "link"))}

    def queues(self) -> set[tuple[str, str]]:
        found = json.loads(self._run("tc", "-json", "qdisc", "show"))
        return {(entry["dev"], entry["kind"]) for entry in found if entry["dev"] != "lo"}

    def _run(self, *command: str) -> str:
        return subprocess.run(
            ["nsenter", f"--net=/proc/self/fd/{self.fd}", *command],
            check=True,
            capture_output=True,
            text=True,
            pass_fds=[self.fd],
        ).stdout


@pytest.fixture
def netns() -> Iterator[Netns]:
    netns = Netns()
    yield netns
    os.close(netns.fd)


@asynccontextmanager
async def network(netns: Netns, vm: Vm, **settings: Any) -> Any:
    """Plugged and told; the namespace is compared at the end."""
    before = netns.links().keys(), netns.queues()
    async with PodNetwork(netns.fd, NetworkSettings(**settings)) as pod:
        await pod.plug(vm)
        await pod.configure(vm)
        yield pod
    vm.close()
    assert (netns.links().keys(), netns.queues()) == before


async def test_the_agent_is_told_what_is_there(netns: Netns) -> None:
    vm = Vm()
    mac = netns.links()["eth0"]["address"]
    async with network(netns, vm):
        nics = [device for device, _ in vm.nics.values() if device.mac == mac]
        assert len(nics) == 1
        assert len(nics[0].tap_fds) == 1
        interfaces = {
            request.interface.name: request.interface
            for method, request in vm.calls
            if method == "UpdateInterface"
        }
        eth0 = interfaces["eth0"]
        assert (eth0.hwAddr, eth0.mtu) == (mac, 1400)
        assert eth0.devicePath.startswith("02/")
        assert [f"{a.address}/{a.mask}" for a in eth0.IPAddresses] == ["10.1.0.2/24", "fd01::2/64"]
        routes = {
            route.dest: route
            for route in (await vm.wait_told("UpdateRoutes")).routes.Routes
            if route.device == "eth0"
        }
        assert routes[""].gateway == "10.1.0.1"
        far = routes["10.9.0.0/16"]
        assert (far.gateway, far.priority, far.mtu) == ("10.1.0.9", 7, 1300)
        assert routes["192.0.2.1/32"].source == "10.1.0.2"
        assert routes["192.0.2.1/32"].gateway == ""
        assert "10.1.0.0/24" not in routes, "the guest's kernel makes that one"
        neighbours = (await vm.wait_told("AddARPNeighbors")).neighbors.ARPNeighbors
        assert [(n.toIPAddress.address, n.lladdr, n.device) for n in neighbours] == [
            ("10.1.0.1", "02:00:00:00:00:99", "eth0")
        ]


async def test_frames_go_both_ways(netns: Netns) -> None:
    vm = Vm()
    async with network(netns, vm):
        eth0 = netns.links()["eth0"]
        tap = netns.links()[f"tap{eth0['ifindex']}_kata"]
        assert tap["mtu"] == 1400
        assert ("eth0", "ingress") in netns.queues()
        assert (tap["ifname"], "ingress") in netns.queues()
        nic = next(d for d, _ in vm.nics.values() if d.mac == eth0["address"])
        fd = vm.nics[nic.id][1][0]
        # What the host's end sends comes out of the tap, after 10 bytes of virtio-net header.
        frame = bytes.fromhex("ffffffffffff020000000001" + "88b5") + b"to the guest".ljust(46)
        netns_send(netns, "host0", frame)
        with trio.fail_after(10):
            while True:
                await trio.lowlevel.wait_readable(fd)
                if os.read(fd, 4096)[10:] == frame:
                    break
        # What the VM sends arrives at the host's end.
        received = netns_receiver(netns, "host0")
        os.write(fd, bytes(10) + frame.replace(b"to the guest", b"to the host "))
        with received, trio.fail_after(10):
            while b"to the host " not in received.recv(4096):
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
async def test_a_queue_for_each_vcpu(netns: Netns, model: str) -> None:
    vm = Vm()
    async with network(netns, vm, model=model, queues=3):
        assert {len(device.tap_fds) for device, _ in vm.nics.values()} == {3}


async def test_none_leaves_the_vm_without(netns: Netns) -> None:
    vm = Vm()
    async with network(netns, vm, model="none"):
        assert not vm.nics
        assert not vm.calls


async def test_changes_are_followed(netns: Netns) -> None:
    vm = Vm()
    async with network(netns, vm) as pod, trio.open_nursery() as nursery:
        vm.calls.clear()
        nursery.start_soon(pod.follow, vm)
        netns.ip("address", "add", "10.1.0.3/24", "dev", "eth0")
        interface = (await vm.wait_told("UpdateInterface")).interface
        assert [a.address for a in interface.IPAddresses][:2] == ["10.1.0.2", "10.1.0.3"]
        netns.ip("link", "set", "eth0", "mtu", "1300")
        assert (await vm.wait_told("UpdateInterface")).interface.mtu == 1300
        await vm.wait_told("UpdateRoutes")
        tap = f"tap{netns.links()['eth0']['ifindex']}_kata"
        assert netns.links()[tap]["mtu"] == 1300
        netns.ip("route", "add", "198.51.100.0/24", "via", "10.1.0.1")
        routes = (await vm.wait_told("UpdateRoutes")).routes.Routes
        assert "198.51.100.0/24" in [route.dest for route in routes]
        netns.ip("link", "add", "late0", "up", "type", "veth", "peer", "late1")
        assert (await vm.wait_told("UpdateInterface")).interface.name == "late0"
        count = len(vm.nics)
        await vm.wait_told("UpdateRoutes")
        netns.ip("link", "delete", "late0")
        await vm.wait_told("UpdateRoutes")
        assert len(vm.nics) == count - 1
        nursery.cancel_scope.cancel()


async def test_what_failed_is_tried_again(netns: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shimv2.network.pod_network._AGAIN", 0.05)
    vm = Vm()
    async with network(netns, vm) as pod, trio.open_nursery() as nursery:
        vm.calls.clear()
        nursery.start_soon(pod.follow, vm)
        vm.failures.append(RpcError(Code.UNAVAILABLE, "not now"))
        netns.ip("address", "add", "10.1.0.3/24", "dev", "eth0")
        interface = (await vm.wait_told("UpdateInterface")).interface
        assert "10.1.0.3" in [a.address for a in interface.IPAddresses]
        nursery.cancel_scope.cancel()


async def test_a_nic_that_the_vm_refuses_leaves_nothing(netns: Netns) -> None:
    before = netns.links().keys(), netns.queues()
    vm = Vm()
    vm.failures.append(CapacityError("no slot"))
    async with PodNetwork(netns.fd, NetworkSettings()) as pod:
        with pytest.raises(CapacityError):
            await pod.plug(vm)
        assert (netns.links().keys(), netns.queues()) == before


async def test_rate_limits_stand_on_both_sides(netns: Netns) -> None:
    vm = Vm()
    async with network(netns, vm, inbound=8_000_000, outbound=16_000_000):
        tap = f"tap{netns.links()['eth0']['ifindex']}_kata"
        assert {("eth0", "tbf"), (tap, "tbf")} <= netns.queues()


async def test_a_filter_of_somebody_else_stays(netns: Netns) -> None:
    netns._run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    vm = Vm()
    async with network(netns, vm):
        assert ("eth0", "clsact") in netns.queues()
        shown = netns._run("tc", "filter", "show", "dev", "eth0", "ingress")
        assert "mirred" in shown
    assert "mirred" not in netns._run("tc", "filter", "show", "dev", "eth0", "ingress")


def netns_send(netns: Netns, name: str, frame: bytes) -> None:
    with netns_receiver(netns, name) as packets:
        packets.send(frame)


def netns_receiver(netns: Netns, name: str) -> Any:
    """A packet socket on a link."""
    packets = call_inside(
        netns.fd, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    )
    packets.bind((name, 3))
    packets.settimeout(10)
    return packets
