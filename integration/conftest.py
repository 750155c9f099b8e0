# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the whole-system tests: the installed product under real containerds."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.lib.configuration import Configuration, installed
from integration.lib.containerd import DEBIAN, Containerd, Edition
from integration.lib.cri import CriNode
from integration.lib.go_tools import containerd_edition
from integration.lib.images import busybox_image
from integration.lib.kata import Kata
from integration.lib.leftovers import left_by
from integration.lib.templates import Templates, without_templates

TREE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def prefix() -> Path:
    """Where the product is installed: by `make install PREFIX=build/prefix`."""
    path = Path(os.environ.get("PYKATA_PREFIX", TREE / "build/prefix"))
    if not (path / "bin/containerd-shim-kata-v2").exists():
        pytest.fail(f"nothing is installed in {path}: run `make install-dev` first")
    return path


@pytest.fixture(scope="session", params=["debian", "go"])
def edition(request: pytest.FixtureRequest) -> Edition:
    """Debian's containerd 1.6, and 2.4 from its Go module."""
    return edition_named(request.param)


def edition_named(name: str) -> Edition:
    """An edition that is there; the Go one is built on first use."""
    if name == "debian":
        if not DEBIAN.containerd.exists():
            pytest.fail("containerd is missing: apt-get install containerd")
        return DEBIAN
    return containerd_edition()


@pytest.fixture(scope="session")
def containerd(edition: Edition, prefix: Path) -> Iterator[Containerd]:
    """One daemon for all tests that don't harm it."""
    with make_containerd(edition, prefix) as daemon:
        yield daemon


@pytest.fixture
def own_containerd(prefix: Path, edition: Edition) -> Iterator[Containerd]:
    """A daemon of the test's own, to be stopped and killed at will."""
    with make_containerd(edition, prefix) as daemon:
        yield daemon


@pytest.fixture(scope="session", autouse=True)
def no_templates_after(prefix: Path) -> Iterator[None]:
    """Templates are the one thing that sandboxes leave: made by a daemon, for the next ones."""
    yield
    subprocess.run([prefix / "bin/kata-runtime", "factory", "destroy"], check=True)


def make_containerd(edition: Edition, prefix: Path) -> Containerd:
    """A started daemon with the test image.

    Debian's sandboxes boot, those of the other one are clones, so that all tests see both.
    """
    configuration = installed(prefix)
    if edition is DEBIAN:
        configuration = without_templates(prefix)
    daemon = Containerd(
        edition,
        shim_path=[prefix / "bin"],
        environment={"KATA_CONF_FILE": str(configuration)},
    )
    daemon.start()
    daemon.import_image(busybox_image())
    return daemon


@pytest.fixture
def kata(containerd: Containerd, request: pytest.FixtureRequest) -> Iterator[Kata]:
    """Runs containers of this test; whatever it leaves behind fails the test."""
    kata = Kata(containerd)
    yield kata
    kata.close()
    left = left_by(kata.mark)
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session", params=["debian", "go", "go-shim"])
def cri_node(request: pytest.FixtureRequest, prefix: Path) -> Iterator[CriNode]:
    """A node with bridged pods: each containerd, and 2.4 with the Sandbox API."""
    name, _, sandboxer = request.param.partition("-")
    with CriNode(edition_named(name), prefix, sandboxer=sandboxer or "podsandbox") as node:
        yield node


@pytest.fixture
def node(cri_node: CriNode) -> Iterator[CriNode]:
    """The node for one test; whatever its pods leave behind fails the test."""
    yield cri_node
    left = cri_node.clean()
    assert not left, f"left behind: {left}"


@pytest.fixture
def with_console(prefix: Path, tmp_path: Path) -> Path:
    """The installed configuration with the debug console on."""
    configuration = Configuration(prefix, tmp_path)
    configuration.set("agent.kata", debug_console_enabled=True)
    return configuration.file


@pytest.fixture
def directory() -> Iterator[Path]:
    """Below /run: a template's path leads to sockets, which must be short."""
    path = Path(tempfile.mkdtemp(prefix=f"{Kata.mark}", dir="/run"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def templates(prefix: Path, directory: Path) -> Iterator[Templates]:
    """Templates of one test; what they leave beside their own directory fails it."""
    templates = Templates(prefix, directory)
    yield templates
    done = templates.command("destroy")
    assert done.returncode == 0, done.stderr
    assert not templates.path.exists()
    left = left_by(f"template-{hashlib.sha256(bytes(templates.path)).hexdigest()[:8]}-")
    assert not left, f"left behind: {left}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    spared = [item for item in items if _is_spared(item)]
    config.hook.pytest_deselected(items=spared)
    items[:] = [item for item in items if item not in spared]
    for item in items:
        if "prefix" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vm)


def _is_spared(item: pytest.Item) -> bool:
    """Whether a test of what containerd has no part in need not run under the others too.

    By `ctr` it runs with Debian's, whose VMs boot, by CRI with the other, whose VMs are clones.
    """
    callspec = getattr(item, "callspec", None)
    if item.get_closest_marker("one_edition") is None or callspec is None:
        return False
    parameters = callspec.params
    return bool(parameters.get("edition") == "go" or parameters.get("cri_node", "go") != "go")


def pytest_report_header() -> str:
    tools = ("qemu-system-x86_64", "containerd", "ctr")
    return "programs: " + ", ".join(f"{t} {shutil.which(t) or 'missing'}" for t in tools)
