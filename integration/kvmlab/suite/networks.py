# SPDX-License-Identifier: Apache-2.0
"""CNI plugins whose links the kernel of a development machine need not have."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.kvmlab.suite.node import node_of
from integration.kvmlab.suite.pods import echoed
from integration.kvmlab.suite.system import SystemContainerd
from integration.lib import cni
from integration.lib.kata import wait_until

_VLAN = 5


@pytest.fixture
def uplink() -> Iterator[str]:
    """A link to have pods on; its other end, also with a VLAN, is in a namespace of its own."""
    peer = ["ip", "-n", "peer"]
    for command in (
        "ip netns add peer",
        "ip link add uplink type veth peer name peer0 netns peer",
        "ip link set uplink up",
        "ip -n peer link set lo up",
        "ip -n peer link set peer0 up",
        f"ip -n peer link add link peer0 name peer0.{_VLAN} type vlan id {_VLAN}",
        f"ip -n peer link set peer0.{_VLAN} up",
    ):
        subprocess.run(command.split(), check=True)
    yield "uplink"
    subprocess.run([*peer, "link", "delete", "peer0"], check=True)
    subprocess.run(["ip", "netns", "delete", "peer"], check=True)


def networks(directory: Path, master: str) -> dict[str, tuple[dict[str, Any], str]]:
    """CNI configuration and the peer's link, by name."""
    return {
        "ipvlan": (cni.ipvlan(directory, master), "peer0"),
        "ipvlan-l3s": (cni.ipvlan(directory, master, mode="l3s"), "peer0"),
        "vlan": (cni.vlan(directory, master, _VLAN), f"peer0.{_VLAN}"),
    }


@pytest.mark.parametrize("name", ["ipvlan", "ipvlan-l3s", "vlan"])
def test_bytes_go_both_ways(
    system: SystemContainerd, uplink: str, tmp_path: Path, name: str
) -> None:
    network, link = networks(tmp_path, uplink)[name]
    address = ["ip", "-n", "peer", "address", "add", f"{cni.GATEWAY_4}/16", "dev", link]
    subprocess.run(address, check=True)
    with node_of(system, network) as client:
        pod = client.run_pod()
        container = client.start_container(pod, "nc", "-ll", "-p", "7", "-e", "cat")
        wait_until(
            lambda: ":7" in client.execute(container, "netstat", "-ltn"), 10, "the server listens"
        )
        assert client.address(pod) in client.execute(container, "ip", "address", "show", "eth0")
        client.execute(container, "ping", "-c", "1", "-W", "10", cni.GATEWAY_4)
        sent = os.urandom(1 << 20)
        assert echoed(client.address(pod), sent, netns="peer") == sent
        client.remove_pod(pod)
        left = client.clean()
        assert not left, f"left behind: {left}"
