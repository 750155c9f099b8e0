# SPDX-License-Identifier: Apache-2.0
"""CNI configuration lists for the plugins that Debian ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CNI_PLUGINS = Path("/usr/lib/cni")

SUBNET_4, GATEWAY_4 = "10.88.0.0/16", "10.88.0.1"
SUBNET_6, GATEWAY_6 = "fd00:88::/64", "fd00:88::1"


def bridge(
    directory: Path, *, ipv6: bool = True, mtu: int = 0, plugins: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A bridge ``pods0`` with IPv4 and IPv6, and `plugins` chained after it.

    Args:
        directory: where host-local keeps its leases.
    """
    main: dict[str, Any] = {
        "type": "bridge",
        "bridge": "pods0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": _host_local(directory, ipv6=ipv6),
    }
    if mtu:
        main["mtu"] = mtu
    return _list("pods", main, *plugins)


def ptp(directory: Path, *, mtu: int = 0) -> dict[str, Any]:
    """A veth pair for each pod, routed by the host."""
    main = {"type": "ptp", "ipam": _host_local(directory, ipv6=False)}
    return _list("pods", main | ({"mtu": mtu} if mtu else {}))


def macvlan(directory: Path, master: str) -> dict[str, Any]:
    """A macvlan interface on `master`."""
    return _list(
        "pods",
        {
            "type": "macvlan",
            "master": master,
            "mode": "bridge",
            "ipam": _host_local(directory, ipv6=False),
        },
    )


def ipvlan(directory: Path, master: str, *, mode: str = "l2") -> dict[str, Any]:
    """An ipvlan interface on `master`: all of them have its MAC address."""
    ipam = _host_local(directory, ipv6=False)
    return _list("pods", {"type": "ipvlan", "master": master, "mode": mode, "ipam": ipam})


def vlan(directory: Path, master: str, number: int) -> dict[str, Any]:
    """A VLAN of `master` for the pod alone."""
    ipam = _host_local(directory, ipv6=False)
    return _list("pods", {"type": "vlan", "master": master, "vlanId": number, "ipam": ipam})


def _host_local(directory: Path, *, ipv6: bool) -> dict[str, Any]:
    ranges = [[{"subnet": SUBNET_4}]]
    routes = [{"dst": "0.0.0.0/0"}]
    if ipv6:
        ranges.append([{"subnet": SUBNET_6}])
        routes.append({"dst": "::/0"})
    return {
        "type": "host-local",
        "dataDir": str(directory / "leases"),
        "ranges": ranges,
        "routes": routes,
    }


def _list(name: str, *plugins: dict[str, Any]) -> dict[str, Any]:
    return {"cniVersion": "0.4.0", "name": name, "plugins": list(plugins)}
