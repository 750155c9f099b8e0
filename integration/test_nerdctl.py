# SPDX-License-Identifier: Apache-2.0
"""nerdctl with `--runtime`: its networks by hooks, published ports, logs by a logger."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.lib.configuration import installed
from integration.lib.containerd import RUNTIME, Containerd
from integration.lib.go_tools import containerd_edition
from integration.lib.host_network import HostNetwork
from integration.lib.images import BUSYBOX_REFERENCE, busybox_image
from integration.lib.kata import wait_until
from integration.lib.leftovers import left_by
from integration.lib.nerdctl import Nerdctl, NoNerdctl, nerdctl

pytestmark = pytest.mark.go

_RUN = ("run", "--runtime", RUNTIME)
_PORT = 18080


@pytest.fixture(scope="module")
def network() -> Iterator[HostNetwork]:
    with HostNetwork() as network:
        yield network


@pytest.fixture(scope="module")
def client(
    network: HostNetwork, prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nerdctl]:
    try:
        program = nerdctl()
    except NoNerdctl as error:
        pytest.skip(f"no nerdctl here: {error}")
    configuration = installed(prefix)
    with Containerd(
        containerd_edition(),
        shim_path=[prefix / "bin"],
        environment={"KATA_CONF_FILE": str(configuration)},
        launcher=network.launcher,
    ) as containerd:
        containerd.import_image(busybox_image())
        yield Nerdctl(program, containerd, network, tmp_path_factory.mktemp("nerdctl"))


def test_one_that_runs_and_is_gone(client: Nerdctl, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host\n")
    script = "cat; cat /file; uname -r; exit 7"
    flags = ("--rm", "-i", "-v", f"{tmp_path}/file:/file:ro", "--net", "none")
    done = client.run(
        *(*_RUN, *flags, BUSYBOX_REFERENCE, "sh", "-c", script), stdin="from stdin\n", check=False
    )
    *given, kernel = done.stdout.splitlines()
    assert (given, done.returncode) == (["from stdin", "from the host"], 7)
    assert kernel != os.uname().release


def test_a_server_from_its_start_to_its_end(client: Nerdctl, network: HostNetwork) -> None:
    script = "mkdir /w; echo hello >/w/index.html; echo serving; exec httpd -f -p 8080 -h /w"
    flags = ("-d", "--name", "web", "-p", f"{_PORT}:8080", "-m", "256m", "--cpus", "1")
    container_id = client.run(
        *(*_RUN, *flags, BUSYBOX_REFERENCE, "sh", "-c", script)
    ).stdout.strip()
    try:
        _wait_for_page(network)
        assert client.run("logs", "web").stdout == "serving\n"
        about = json.loads(client.run("inspect", "web").stdout)[0]
        addresses = client.run("exec", "web", "ip", "addr", "show", "eth0").stdout
        assert f"inet {about['NetworkSettings']['IPAddress']}/" in addresses
        assert client.run("exec", "-i", "web", "cat", stdin="twice\n").stdout == "twice\n"
        used = client.run("stats", "--no-stream", "--format", "{{.MemUsage}}", "web").stdout
        assert used.strip().endswith("/ 256MiB")
        client.run("pause", "web")
        client.run("unpause", "web")
        client.run("stop", "-t", "1", "web")
        client.run("start", "web")
        _wait_for_page(network)
        assert client.run("exec", "web", "hostname").stdout.strip() == container_id[:12]
    finally:
        client.run("rm", "-f", "web")
    left = left_by(container_id)
    assert not left, f"left behind: {left}"
    devices = network.run("ip", "-o", "link")
    assert "veth" not in devices, devices


def _wait_for_page(network: HostNetwork) -> None:
    def page() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/", timeout=5) as reply:
                return bool(reply.read() == b"hello\n")
        except OSError:
            return False

    wait_until(lambda: network.call(page), 30, "the published port answers")
