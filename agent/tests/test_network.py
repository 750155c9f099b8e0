# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from agent import network, routes, waiting
from agent.api import agent_pb2, types_pb2
from ttrpc.errors import Code, RpcError

Run = Callable[..., Any]

MAC = "02:00:00:00:00:01"
OTHER_MAC = "02:00:00:00:00:02"

pytestmark = pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")


def ip(*arguments: str) -> Any:
    done = subprocess.run(["ip", "-j", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    return json.loads(done.stdout or "[]")


def _pair() -> None:
    """Two NICs as they look when fresh (a veth pair, so that there is a carrier)."""
    ip("link", "add", "ens4", "address", MAC, "type", "veth", "peer", "name", "ens5")
    ip("link", "set", "ens5", "address", OTHER_MAC)
    ip("link", "set", "lo", "up")


def _update(**fields: Any) -> types_pb2.Interface:
    return waiting.run(network.update_interface(types_pb2.Interface(**fields)))


def _addresses(*texts: str) -> list[types_pb2.IPAddress]:
    return [
        types_pb2.IPAddress(
            family=types_pb2.v6 if ":" in text else types_pb2.v4,
            address=text.partition("/")[0],
            mask=text.partition("/")[2],
        )
        for text in texts
    ]


def _listed(name: str) -> dict[str, Any]:
    (entry,) = ip("address", "show", "dev", name)
    found = {f"{a['local']}/{a['prefixlen']}" for a in entry["addr_info"] if a["scope"] == "global"}
    return {**entry, "addresses": found}


def test_interface_is_named_addressed_and_up(namespaces: Run) -> None:
    def child() -> tuple[Any, ...]:
        _pair()
        answer = _update(
            name="eth0",
            hwAddr=MAC,
            mtu=1400,
            IPAddresses=_addresses("10.1.2.3/24", "fd00::3/64"),
        )
        return answer.SerializeToString(), _listed("eth0")

    raw, listed = namespaces(child)
    answer = types_pb2.Interface.FromString(raw)
    assert (answer.name, answer.hwAddr, answer.mtu, answer.type) == ("eth0", MAC, 1400, "veth")
    texts = {f"{address.address}/{address.mask}" for address in answer.IPAddresses}
    assert {"10.1.2.3/24", "fd00::3/64"} <= texts
    assert listed["addresses"] == {"10.1.2.3/24", "fd00::3/64"}
    assert listed["mtu"] == 1400
    assert "UP" in listed["flags"]
    assert {"10.1.2.255"} == {a["broadcast"] for a in listed["addr_info"] if "broadcast" in a}
    assert not any(a.get("tentative") for a in listed["addr_info"] if a["local"] == "fd00::3")


def test_second_update_replaces_addresses(namespaces: Run) -> None:
    def child() -> list[Any]:
        _pair()
        _update(name="eth0", hwAddr=MAC, IPAddresses=_addresses("10.1.2.3/24", "10.1.2.4/24"))
        _update(
            name="eth0",
            hwAddr=MAC,
            raw_flags=0x80,
            IPAddresses=_addresses("10.1.2.4/24", "10.9.0.1/16"),
        )
        listed = _listed("eth0")
        return [listed["addresses"], "NOARP" in listed["flags"]]

    assert namespaces(child) == [{"10.1.2.4/24", "10.9.0.1/16"}, True]


def test_two_interfaces_change_names(namespaces: Run) -> None:
    def child() -> dict[str, str]:
        _pair()
        ip("link", "set", "ens5", "up")
        _update(name="ens5", hwAddr=MAC)
        _update(name="ens4", hwAddr=OTHER_MAC)
        return {entry["ifname"]: entry["address"] for entry in ip("link", "show")}

    names = namespaces(child)
    assert names["ens5"] == MAC
    assert names["ens4"] == OTHER_MAC


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"name": "eth0", "hwAddr": "02:99:00:00:00:01"}, Code.NOT_FOUND, "Link not found"),
        ({"name": "", "hwAddr": MAC}, Code.INVALID_ARGUMENT, "name"),
        ({"name": "a" * 16, "hwAddr": MAC}, Code.INVALID_ARGUMENT, "aaa"),
        ({"name": "eth0"}, Code.INVALID_ARGUMENT, "hwAddr"),
        ({"name": "eth0", "hwAddr": "02:00"}, Code.NOT_FOUND, "02:00"),
        ({"name": "eth0", "hwAddr": "zz"}, Code.INVALID_ARGUMENT, "zz"),
        ({"name": "eth0", "devicePath": "xx"}, Code.INVALID_ARGUMENT, "xx"),
        (
            {"name": "eth0", "hwAddr": MAC, "IPAddresses": _addresses("10.0.0.300/8")},
            Code.INVALID_ARGUMENT,
            "10.0.0.300",
        ),
        (
            {"name": "eth0", "hwAddr": MAC, "IPAddresses": _addresses("10.0.0.3/33")},
            Code.INVALID_ARGUMENT,
            "/33",
        ),
        ({"name": "eth0", "hwAddr": MAC, "mtu": 1 << 30}, Code.INTERNAL, "eth0"),
    ],
)
def test_bad_interfaces(namespaces: Run, fields: dict[str, Any], code: Code, text: str) -> None:
    def child() -> tuple[Code, str]:
        _pair()
        try:
            _update(**fields)
        except RpcError as error:
            return error.code, error.message
        raise AssertionError("accepted")

    got, message = namespaces(child)
    assert got == code
    assert text in message


def test_list_interfaces(namespaces: Run) -> None:
    def child() -> bytes:
        _pair()
        return network.list_interfaces().SerializeToString()

    found = {
        item.name: item for item in agent_pb2.Interfaces.FromString(namespaces(child)).Interfaces
    }
    assert set(found) == {"lo", "ens4", "ens5"}
    assert [address.address for address in found["lo"].IPAddresses] == ["127.0.0.1", "::1"]
    assert found["lo"].IPAddresses[0].mask == "8"
    assert found["ens4"].hwAddr == MAC


def _routes(*entries: dict[str, Any]) -> agent_pb2.Routes:
    return agent_pb2.Routes(Routes=[types_pb2.Route(**entry) for entry in entries])


def test_routes_replace_what_was_there(namespaces: Run) -> None:
    def child() -> tuple[Any, ...]:
        _pair()
        ip("link", "set", "ens5", "up")
        _update(name="eth0", hwAddr=MAC, IPAddresses=_addresses("10.1.2.3/24", "fd00::3/64"))
        ip("route", "add", "192.168.7.0/24", "via", "10.1.2.9")
        answer = routes.update_routes(
            _routes(
                # deliberately before the route that makes its gateway reachable
                {"dest": "172.16.0.0/12", "gateway": "169.254.1.1", "device": "eth0", "mtu": 1300},
                {"gateway": "10.1.2.1", "device": "eth0", "source": "10.1.2.3"},
                {"dest": "169.254.1.1/32", "device": "eth0", "scope": 253},
                {"dest": "10.77.0.0/16", "gateway": "10.200.0.1", "device": "eth0", "flags": 4},
                {"gateway": "fd00::1", "device": "eth0", "family": types_pb2.v6},
            )
        )
        again = routes.update_routes(answer)
        return (
            answer.SerializeToString(),
            again.SerializeToString(),
            ip("route", "show"),
            ip("-6", "route", "show", "default"),
        )

    raw, again, shown, six = namespaces(child)
    assert raw == again  # what is listed can be given back
    table = {route["dst"]: route for route in shown}
    assert set(table) == {"default", "10.1.2.0/24", "169.254.1.1", "172.16.0.0/12", "10.77.0.0/16"}
    assert table["default"]["gateway"] == "10.1.2.1"
    assert table["default"]["prefsrc"] == "10.1.2.3"
    assert table["169.254.1.1"]["scope"] == "link"
    assert table["172.16.0.0/12"]["metrics"] == [{"mtu": 1300}]
    assert table["10.77.0.0/16"]["flags"] == ["onlink"]
    assert table["10.1.2.0/24"]["protocol"] == "kernel"
    assert [route["gateway"] for route in six] == ["fd00::1"]


@pytest.mark.parametrize(
    ("route", "code", "text"),
    [
        ({"dest": "10.0.0.0/8", "gateway": "1.2.3.4"}, Code.INTERNAL, "10.0.0.0/8 via 1.2.3.4"),
        ({"dest": "10.0.0.0/8", "device": "eth9"}, Code.NOT_FOUND, "eth9"),
        ({"dest": "10.0.0.0/8"}, Code.INVALID_ARGUMENT, "neither"),
        ({"dest": "10.0.0/8", "device": "lo"}, Code.INVALID_ARGUMENT, "10.0.0"),
        ({"gateway": "x", "device": "lo"}, Code.INVALID_ARGUMENT, "'x'"),
    ],
)
def test_bad_routes(namespaces: Run, route: dict[str, Any], code: Code, text: str) -> None:
    def child() -> tuple[Code, str]:
        _pair()
        try:
            routes.update_routes(_routes(route))
        except RpcError as error:
            return error.code, error.message
        raise AssertionError("accepted")

    got, message = namespaces(child)
    assert got == code
    assert text in message


def test_neighbours(namespaces: Run) -> None:
    def child() -> Any:
        _pair()
        _update(name="eth0", hwAddr=MAC, IPAddresses=_addresses("10.1.2.3/24", "fd00::3/64"))
        for _ in range(2):  # twice is no error
            network.add_arp_neighbors(
                [
                    types_pb2.ARPNeighbor(
                        toIPAddress=_addresses("10.1.2.1")[0],
                        device="eth0",
                        lladdr=OTHER_MAC,
                        state=0x80,
                    ),
                    types_pb2.ARPNeighbor(
                        toIPAddress=_addresses("fd00::1")[0], device="eth0", lladdr=OTHER_MAC
                    ),
                ]
            )
        with pytest.raises(RpcError) as caught:
            network.add_arp_neighbors(
                [types_pb2.ARPNeighbor(toIPAddress=_addresses("10.1.2.1")[0], device="eth7")]
            )
        return ip("neigh", "show", "nud", "permanent"), caught.value.code

    shown, code = namespaces(child)
    assert {(entry["dst"], entry["lladdr"]) for entry in shown} == {
        ("10.1.2.1", OTHER_MAC),
        ("fd00::1", OTHER_MAC),
    }
    assert code == Code.NOT_FOUND
