# SPDX-License-Identifier: Apache-2.0
"""The lab's own containerd, as the tests' helpers see it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.kvmlab.suite.node import node_of
from integration.kvmlab.suite.system import SystemContainerd
from integration.lib import cni
from integration.lib.crictl import Crictl
from integration.lib.images import busybox_image
from integration.lib.kata import Kata
from integration.lib.leftovers import left_by

_SHOWN = 4000  # characters of a failure, from its end


@pytest.fixture(scope="session")
def system() -> SystemContainerd:
    """containerd as Debian starts it, with our runtime installed for it."""
    if "PYKATA_LAB" not in os.environ:
        pytest.fail("these tests run in the lab: python -m integration.kvmlab run")
    daemon = SystemContainerd(Path("/run/containerd/containerd.sock"))
    daemon.import_image(busybox_image())
    return daemon


@pytest.fixture
def kata(system: SystemContainerd) -> Iterator[Kata]:
    """Runs containers of this test; whatever it leaves behind fails the test."""
    kata = Kata(system)
    yield kata
    kata.close()
    left = left_by(kata.mark)
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def bridged(system: SystemContainerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crictl]:
    """The system's containerd as a node of Kubernetes, its pods on a bridge."""
    with node_of(system, cni.bridge(tmp_path_factory.mktemp("leases"))) as client:
        yield client


@pytest.fixture
def node(bridged: Crictl) -> Iterator[Crictl]:
    """The node for one test; whatever its pods leave behind fails the test."""
    yield bridged
    left = bridged.clean()
    assert not left, f"left behind: {left}"


class _Failures:
    """Shows each at once, not only at the end: the machine may be lost before."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write(f"\n{report.longreprtext[-_SHOWN:]}\n", flush=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    assert isinstance(terminal, pytest.TerminalReporter)
    config.pluginmanager.register(_Failures(terminal))
