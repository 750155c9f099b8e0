# SPDX-License-Identifier: Apache-2.0
"""Pods on real CNI networks: what goes through, what the guest sees, what is left."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import edition_named
from integration.lib import cni, programs
from integration.lib.configuration import Configuration, installed
from integration.lib.containerd import RUNTIME
from integration.lib.cri import CriNode
from integration.lib.host_network import call_in
from integration.lib.images import BUSYBOX_REFERENCE, busybox_image
from integration.lib.kata import Kata, wait_until
from integration.lib.leftovers import left_by

_MANY = 100 << 20  # bytes of a large transfer
_CONNECTIONS = 500


@pytest.fixture(scope="module", params=["debian", "go-shim"])
def shared_node(request: pytest.FixtureRequest, prefix: Path) -> Iterator[CriNode]:
    """A node whose pods are on a bridge, with IPv4, IPv6 and host ports."""
    name, _, sandboxer = request.param.partition("-")
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    network = functools.partial(cni.bridge, plugins=[portmap])
    sandboxer = sandboxer or "podsandbox"
    with CriNode(edition_named(name), prefix, network=network, sandboxer=sandboxer) as node:
        yield node
        left = node.clean()
        assert not left, f"left behind: {left}"


class Echo:
    """A pod with an echo server on port 7, on every address of it."""

    def __init__(self, node: CriNode, **more: Any) -> None:
        self.node = node
        self.pod = node.run_pod(**more)
        self.container = self.serve("7")
        status = node.inspect_pod(self.pod)["status"]["network"]
        self.ipv4 = str(status["ip"])
        self.ipv6 = next((str(a["ip"]) for a in status.get("additionalIps") or []), "")
        wait_until(lambda: ":7" in self.run("netstat", "-ltn"), 10, "the server listens")

    def serve(self, *arguments: str) -> str:
        """A container with the echo server."""
        program = str(programs.build("echo-server", programs.ECHO_SERVER))
        mount = {"host_path": program, "container_path": "/echo-server", "readonly": True}
        return self.node.start_container(self.pod, "/echo-server", *arguments, mounts=[mount])

    def run(self, *command: str) -> str:
        return self.node.execute(self.container, *command)


@pytest.fixture(scope="module")
def echo(shared_node: CriNode) -> Iterator[Echo]:
    echo = Echo(shared_node)
    yield echo
    shared_node.remove_pod(echo.pod)


def connect(node: CriNode, address: str, port: int = 7) -> socket.socket:
    """A connection from the host."""
    return node.host.call(lambda: socket.create_connection((address, port), timeout=30))


def round_trip(connection: socket.socket, size: int) -> None:
    """Send random bytes to an echo server; what comes back has to have the same digest."""
    block = os.urandom(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send() -> None:
        for number in range(size >> 20):
            piece = number.to_bytes(8, "big") + block[8:]  # no two are the same
            sent.update(piece)
            connection.sendall(piece)

    sender = threading.Thread(target=send)
    sender.start()
    missing = size
    while missing:
        data = connection.recv(min(missing, 1 << 18))
        assert data, f"the connection ended {missing} bytes early"
        received.update(data)
        missing -= len(data)
    sender.join()
    assert received.hexdigest() == sent.hexdigest()


def test_the_guest_has_what_cni_made(echo: Echo) -> None:
    node = echo.node
    outside = _links(node.netns(echo.pod))["eth0"]
    inside = echo.run("ip", "address", "show", "eth0")
    assert f"link/ether {outside['address']}" in inside
    assert f"mtu {outside['mtu']}" in inside
    assert f"inet {echo.ipv4}/16" in inside
    assert f"inet6 {echo.ipv6}/64" in inside
    assert f"default via {cni.GATEWAY_4} dev eth0" in echo.run("ip", "route")
    assert f"default via {cni.GATEWAY_6} dev eth0" in echo.run("ip", "-6", "route")


def test_host_to_pod_and_back(echo: Echo) -> None:
    with connect(echo.node, echo.ipv4) as connection:
        round_trip(connection, _MANY)


@pytest.mark.slow
def test_a_gigabyte(echo: Echo) -> None:
    with connect(echo.node, echo.ipv4) as connection:
        round_trip(connection, 1 << 30)


def test_host_to_pod_by_ipv6(echo: Echo) -> None:
    with connect(echo.node, echo.ipv6) as connection:
        round_trip(connection, 8 << 20)


def test_pod_to_host_and_back(echo: Echo) -> None:
    node = echo.node
    with node.host.call(lambda: socket.create_server((cni.GATEWAY_4, 0))) as server:
        port = str(server.getsockname()[1])
        client = subprocess.Popen(
            [*node.crictl_command(), "exec", echo.container, "nc", cni.GATEWAY_4, port, "-e", "cat"]
        )
        try:
            server.settimeout(30)
            connection, _ = server.accept()
            with connection:
                round_trip(connection, _MANY)
            assert client.wait(30) == 0
        finally:
            client.kill()
            client.wait()


def test_many_connections_at_once(echo: Echo) -> None:
    found = echo.node.host.call(lambda: _open_many(echo.ipv4, _CONNECTIONS))
    try:
        pending: dict[socket.socket, bytes] = {}
        with selectors.DefaultSelector() as selector:
            for number, connection in enumerate(found):
                text = f"connection {number}\n".encode()
                connection.sendall(text)
                pending[connection] = text
                selector.register(connection, selectors.EVENT_READ)
            deadline = time.monotonic() + 120
            while pending:
                assert time.monotonic() < deadline, f"{len(pending)} got no answer"
                for key, _ in selector.select(1):
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    data = connection.recv(100)
                    assert data, "a connection was closed"
                    assert pending[connection].startswith(data)
                    pending[connection] = pending[connection][len(data) :]
                    if not pending[connection]:
                        del pending[connection]
    finally:
        for connection in found:
            connection.close()


def _open_many(address: str, count: int) -> list[socket.socket]:
    return [socket.create_connection((address, 7), timeout=60) for _ in range(count)]


def test_pod_to_pod(echo: Echo) -> None:
    other = echo.node.run_pod()
    container = echo.node.start_container(other, "sleep", "1000")
    count = 4 << 20
    script = (
        f"dd if=/dev/urandom of=/data bs=1M count={count >> 20} 2>/dev/null; "
        "sha256sum </data; nc {} 7 </data | head -c {} | sha256sum"
    )
    for address in (echo.ipv4, echo.ipv6):
        text = echo.node.execute(container, "sh", "-c", script.format(address, count))
        before, after = text.splitlines()
        assert before == after
    echo.node.remove_pod(other)


def test_a_host_port(shared_node: CriNode) -> None:
    echo = Echo(shared_node, port_mappings=[{"container_port": 7, "host_port": 7007}])
    with connect(shared_node, cni.GATEWAY_4, 7007) as connection:
        round_trip(connection, 1 << 20)
    shared_node.remove_pod(echo.pod)


def test_port_forward(echo: Echo) -> None:
    node = echo.node
    with node.port_forward(echo.pod, 7) as port, connect(node, "127.0.0.1", port) as connection:
        round_trip(connection, 16 << 20)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_port_forward_to_a_server_of_ipv6_only(echo: Echo) -> None:
    node = echo.node
    server = echo.serve("8", "::1 only")
    wait_until(lambda: "::1:8" in echo.run("netstat", "-ltn"), 10, "the server listens")
    with node.port_forward(echo.pod, 8) as port, connect(node, "127.0.0.1", port) as connection:
        round_trip(connection, 1 << 20)
    node.crictl("rm", "-f", server)


def test_port_forward_to_a_port_without_a_server(echo: Echo) -> None:
    node = echo.node
    with node.port_forward(echo.pod, 9) as port, connect(node, "127.0.0.1", port) as connection:
        connection.sendall(b"anybody?")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    with connect(echo.node, echo.ipv4) as connection:
        round_trip(connection, 1 << 20)


def test_an_interface_that_comes_later_and_goes(echo: Echo) -> None:
    namespace = echo.node.netns(echo.pod)

    def outside(*command: str) -> None:
        subprocess.run(["nsenter", f"--net={namespace}", "ip", *command], check=True)

    before = _links(namespace)
    outside("link", "add", "late0", "type", "veth", "peer", "name", "other0")
    outside("address", "add", "192.0.2.5/24", "dev", "late0")
    outside("link", "set", "other0", "up")
    outside("link", "set", "late0", "up")
    wait_until(lambda: "inet 192.0.2.5/24" in echo.run("ip", "address"), 10, "the guest has it")
    outside("address", "add", "192.0.2.6/24", "dev", "late0")
    outside("route", "add", "198.51.100.0/24", "via", "192.0.2.1", "metric", "7")
    wait_until(
        lambda: "198.51.100.0/24 via 192.0.2.1 dev late0  metric 7" in echo.run("ip", "route"),
        10,
        "the guest has the route",
    )
    assert "inet 192.0.2.6/24" in echo.run("ip", "address")
    outside("link", "delete", "late0")
    wait_until(lambda: "late0" not in echo.run("ip", "link"), 10, "it is gone")
    # The tap goes when QEMU has let go of the device, which the guest has lost before.
    wait_until(lambda: _links(namespace).keys() == before.keys(), 10, "its tap is gone")
    with connect(echo.node, echo.ipv4) as connection:
        round_trip(connection, 1 << 20)


def test_ctr_run_with_cni(shared_node: CriNode, prefix: Path, tmp_path: Path) -> None:
    """ctr sets the network up between Create and Start, in the namespace of the task's pid."""
    node = shared_node
    # ctr reads /etc/cni/net.d and /opt/cni/bin, whatever it is told.
    (tmp_path / "etc/cni/net.d").mkdir(parents=True)
    (tmp_path / "etc/cni/net.d/10-pods.conflist").write_text(json.dumps(cni.bridge(node.directory)))
    (tmp_path / "opt/cni").mkdir(parents=True)
    (tmp_path / "opt/cni/bin").symlink_to(cni.CNI_PLUGINS)
    covered = "".join(
        f"mount -t overlay -o lowerdir={tmp_path}{path}:{path} overlay {path} && "
        for path in ("/etc", "/opt")
    )
    node.containerd.import_image(busybox_image())
    name = f"{node.mark}ctr"
    command = [
        *(*node.containerd.ctr_command(), "run", "--rm", "--cni", "--runtime", RUNTIME),
        *("--runtime-config-path", str(installed(prefix)), BUSYBOX_REFERENCE, name),
        *("sh", "-c", f"ip address show eth0 && ping -c 1 {cni.GATEWAY_4}"),
    ]
    text = node.host.run("unshare", "-m", "sh", "-c", f'{covered} exec "$@"', "sh", *command)
    assert "inet 10.88." in text
    assert " 0% packet loss" in text
    assert not left_by(name)
    assert not node.pod_links()[1:], "only the shared pod's"


@pytest.mark.parametrize(
    "network",
    [functools.partial(cni.ptp, mtu=1400), functools.partial(cni.bridge, mtu=9000)],
    ids=["ptp-1400", "bridge-9000"],
)
def test_plugin_and_mtu(network: functools.partial[dict[str, Any]], prefix: Path) -> None:
    mtu = network.keywords["mtu"]
    with CriNode(edition_named("debian"), prefix, network=network) as node:
        echo = Echo(node)
        assert f"mtu {mtu}" in echo.run("ip", "link", "show", "eth0")
        assert _links(node.netns(echo.pod))[_tap(node, echo)]["mtu"] == mtu
        # As much as fits in one frame: 28 bytes are the headers.
        echo.run("ping", "-c", "1", "-s", str(mtu - 28), cni.GATEWAY_4)
        with connect(node, echo.ipv4) as connection:
            round_trip(connection, 16 << 20)
        assert not node.clean()


def test_macvlan(prefix: Path) -> None:
    network = functools.partial(cni.macvlan, master="uplink")
    with CriNode(edition_named("debian"), prefix, network=network) as node:
        _add_uplink(node)  # its pods can't reach the master's own address: a peer plays
        echo = Echo(node)
        with connect(node, echo.ipv4) as connection:
            round_trip(connection, 4 << 20)
        assert not node.clean()


def _add_uplink(node: CriNode) -> None:
    """A link to have pods on, whose other end is the host's with the gateway's address."""
    for command in (
        "link add uplink type veth peer name peer0",
        "link set uplink up",
        "link set peer0 up",
        f"address add {cni.GATEWAY_4}/16 dev peer0",
    ):
        node.host.run("ip", *command.split())


@pytest.mark.parametrize("model", ["macvtap", "none"])
def test_model(model: str, prefix: Path, tmp_path: Path) -> None:
    configuration = Configuration(prefix, tmp_path)
    configuration.set("runtime", internetworking_model=model)
    with CriNode(edition_named("debian"), prefix, configuration=configuration.file) as node:
        pod = node.run_pod()
        namespace = node.netns(pod)
        if model == "none":
            container = node.start_container(pod, "sleep", "1000")
            assert "eth0" not in node.execute(container, "ip", "link")
            assert list(_links(namespace)) == ["lo", "eth0"]
        else:
            node.remove_pod(pod)
            echo = Echo(node)
            with connect(node, echo.ipv4) as connection:
                round_trip(connection, 16 << 20)
        assert not node.clean()


@pytest.mark.one_edition
def test_the_host_s_own_network(kata: Kata) -> None:
    """Refused, or for the VMM alone; a spec without one, as of `hostNetwork`, gets an empty one."""
    own = f"network:/proc/{os.getpid()}/ns/net"
    done = kata.run("true", flags=("--with-ns", own), check=False)
    assert done.returncode
    assert "is the host's own; a sandbox can't share it" in done.stderr
    before = _links(Path("/proc/self/ns/net")).keys()
    asks = "io.katacontainers.config.runtime"
    flags = ("--annotation", f"{asks}.disable_new_netns=true")
    flags += ("--annotation", f"{asks}.internetworking_model=none")
    done = kata.run("ip", "-o", "link", flags=("--with-ns", own, *flags))
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["lo:"]
    container = kata.start("sleep", "1000", flags=("--net-host",))
    links = kata.execute(container, "ip", "-o", "link").stdout.splitlines()
    assert [line.split()[1] for line in links] == ["lo:"]
    assert _links(Path("/proc/self/ns/net")).keys() == before
    log = kata.containerd.last_log_lines(10_000).splitlines()
    own_lines = [line for line in log if f'sandbox="{container}"' in line]
    assert sum("no network namespace is given" in line for line in own_lines) == 1


def test_rate_limits(prefix: Path, tmp_path: Path) -> None:
    """Into the VM and out of it, each by itself."""
    configuration = Configuration(prefix, tmp_path)
    configuration.set(
        "hypervisor.qemu", rx_rate_limiter_max_rate=24_000_000, tx_rate_limiter_max_rate=8_000_000
    )
    with CriNode(edition_named("debian"), prefix, configuration=configuration.file) as node:
        container = node.start_container(node.run_pod(), "sleep", "1000")
        assert 12_000_000 < _rate(node, container, into=True) < 27_000_000
        assert 4_000_000 < _rate(node, container, into=False) < 9_000_000
        assert not node.clean()


def _rate(node: CriNode, container: str, *, into: bool) -> float:
    """Bits per second of a connection that the pod makes to the host."""
    size = 6 << 20 if into else 3 << 20
    with node.host.call(lambda: socket.create_server((cni.GATEWAY_4, 0))) as server:
        target = f"{cni.GATEWAY_4} {server.getsockname()[1]}"
        script = f"nc {target} | wc -c" if into else f"head -c {size} /dev/zero | nc {target}"
        with subprocess.Popen(
            [*node.crictl_command(), "exec", container, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as client:
            server.settimeout(30)
            connection, _ = server.accept()
            begin = time.monotonic()
            with connection:
                if into:
                    connection.sendall(bytes(size))
                else:
                    missing = size
                    while missing:
                        missing -= len(connection.recv(1 << 18)) or size  # or it ended early
                        assert missing >= 0
            # In the one direction nc ends with what it has got, in the other with our end.
            said = client.communicate(timeout=60)[0]
            if into:
                assert int(said) == size
            return size * 8 / (time.monotonic() - begin)


def test_the_bandwidth_plugin(prefix: Path) -> None:
    """It shapes on the host's side of the pod; the bursts that containerd sets are gigabits."""
    bandwidth = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
    network = functools.partial(cni.bridge, plugins=[bandwidth])
    limits = {f"kubernetes.io/{way}-bandwidth": "16M" for way in ("ingress", "egress")}
    with CriNode(edition_named("debian"), prefix, network=network) as node:
        echo = Echo(node, annotations=limits)
        queues = json.loads(node.host.run("tc", "-json", "qdisc", "show"))
        rates = [entry["options"]["rate"] for entry in queues if entry["kind"] == "tbf"]
        assert rates == [2_000_000] * 2, "bytes per second, on the veth and on an ifb"
        with connect(node, echo.ipv4) as connection:
            round_trip(connection, 16 << 20)
        assert not node.clean()


def test_the_namespace_is_left_as_it_was(prefix: Path) -> None:
    with CriNode(edition_named("debian"), prefix) as node:
        pod = node.run_pod()
        namespace = node.netns(pod)
        assert _qdiscs(namespace) == {"eth0": {"ingress", "noqueue"}, "tap": {"ingress"}}
        vmm = next(iter(_processes_in(namespace)))
        os.kill(vmm, 9)
        wait_until(lambda: not _processes_in(namespace), 10, "the VMM is gone")
        wait_until(
            lambda: _qdiscs(namespace) == {"eth0": {"noqueue"}}, 10, "the tap and filters are gone"
        )
        assert list(_links(namespace)) == ["lo", "eth0"]
        assert not node.clean()


@pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
def test_a_killed_shim_leaves_the_namespace_as_it_was(
    model: str, prefix: Path, tmp_path: Path
) -> None:
    configuration = Configuration(prefix, tmp_path)
    configuration.set("runtime", internetworking_model=model)
    configuration.set("hypervisor.qemu", tx_rate_limiter_max_rate=8_000_000)
    with CriNode(edition_named("debian"), prefix, configuration=configuration.file) as node:
        pod = node.run_pod()
        namespace = node.netns(pod)
        state = Path("/run/vc/sbs", pod, "state.json")
        os.kill(json.loads(state.read_text())["processes"]["shim"][0], 9)
        wait_until(lambda: not state.exists(), 10, "`delete` has run")
        assert list(_links(namespace)) == ["lo", "eth0"]
        assert _qdiscs(namespace) == {"eth0": {"noqueue"}}
        assert not node.clean()


def _links(namespace: Path) -> dict[str, dict[str, Any]]:
    """Name → link, as `ip` shows it."""
    text = _outside(namespace, "ip", "-json", "link")
    return {link["ifname"]: link for link in json.loads(text)}


def _tap(node: CriNode, echo: Echo) -> str:
    return next(name for name in _links(node.netns(echo.pod)) if name.startswith("tap"))


def _qdiscs(namespace: Path) -> dict[str, set[str]]:
    """Link → kinds of its queues; loopback left out, "tap" for the tap."""
    found: dict[str, set[str]] = {}
    for entry in json.loads(_outside(namespace, "tc", "-json", "qdisc", "show")):
        name = "tap" if entry["dev"].startswith("tap") else entry["dev"]
        if name != "lo" and not (name == "tap" and entry["kind"] != "ingress"):
            found.setdefault(name, set()).add(entry["kind"])
    return found


def _outside(namespace: Path, *command: str) -> str:
    return subprocess.run(
        ["nsenter", f"--net={namespace}", *command], check=True, capture_output=True, text=True
    ).stdout


def _processes_in(namespace: Path) -> list[int]:
    """Processes whose network namespace it is."""
    wanted = call_in(namespace, lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino == wanted:
                found.append(int(entry.name))
        except OSError:
            continue
    return found
