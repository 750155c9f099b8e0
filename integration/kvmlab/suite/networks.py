# SPDX-License-Identifier: Apache-2.0
"""CNI plugins whose links the kernel of a development machine need not have."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration.kvmlab.suite.node import node_of
from integration.kvmlab.suite.pods import echoed
from integration.kvmlab.suite.system import SystemContainerd
from integration.lib import cni
from integration.lib.kata import wait_until

_VLAN = 5
# Of the link's two ends, for pods that are routed instead of bridged.
_HOST, _PEER = "10.87.0.2", "10.87.0.1"


@pytest.fixture
def uplink() -> Iterator[str]:
    """A link to have pods on; its other end, also with a VLAN, is in a namespace of its own."""
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
    subprocess.run(["ip", "-n", "peer", "link", "delete", "peer0"], check=True)
    subprocess.run(["ip", "netns", "delete", "peer"], check=True)


@dataclass(frozen=True)
class Case:
    """A plugin.

    Attributes:
        network: its CNI configuration, from a directory for leases and the link.
        address: the peer's, as pods have to see it.
        setup: what the peer, and for a routed network the host, has to be told.
    """

    network: Callable[[Path, str], dict[str, Any]]
    address: str
    setup: tuple[str, ...]


CASES = {
    "ipvlan": Case(
        cni.ipvlan,
        cni.GATEWAY_4,
        (f"ip -n peer address add {cni.GATEWAY_4}/16 dev peer0",),
    ),
    "ipvlan-l3": Case(
        partial(cni.ipvlan, mode="l3"),
        _PEER,
        (
            f"ip -n peer address add {_PEER}/24 dev peer0",
            f"ip -n peer route add {cni.SUBNET_4} via {_HOST}",
            f"ip address add {_HOST}/24 dev uplink",
        ),
    ),
    "vlan": Case(
        partial(cni.vlan, number=_VLAN),
        cni.GATEWAY_4,
        (f"ip -n peer address add {cni.GATEWAY_4}/16 dev peer0.{_VLAN}",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_go_both_ways(
    system: SystemContainerd, uplink: str, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    for command in case.setup:
        subprocess.run(command.split(), check=True)
    with node_of(system, case.network(tmp_path, uplink)) as client:
        pod = client.run_pod()
        container = client.start_container(pod, "nc", "-ll", "-p", "7", "-e", "cat")
        wait_until(
            lambda: ":7" in client.execute(container, "netstat", "-ltn"), 10, "the server listens"
        )
        assert client.address(pod) in client.execute(container, "ip", "address", "show", "eth0")
        client.execute(container, "ping", "-c", "1", "-W", "10", case.address)
        sent = os.urandom(1 << 20)
        assert echoed(client.address(pod), sent, netns="peer") == sent
        client.remove_pod(pod)
        left = client.clean()
        assert not left, f"left behind: {left}"
