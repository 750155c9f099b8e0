# SPDX-License-Identifier: Apache-2.0
"""A sandbox's page: processes that are there, guests that are not, or that make things up."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from agent.api import agent_pb2
from shimv2 import state
from shimv2.metrics import overhead, procfs
from shimv2.metrics.durations import Durations
from shimv2.metrics.exposition import Page
from shimv2.metrics.sandbox import page_of
from shimv2.sandbox import Sandbox
from shimv2.timeline import Timeline
from ttrpc.errors import Code, RpcError


class Guest:
    """An agent with one container, and what it says."""

    def __init__(self) -> None:
        self.durations = Durations()
        self.vsock_bytes = (10, 20)
        self.metrics = 'kata_guest_load{item="load1"} 0.5\n'
        self.cpu = 0.0
        self.memory = 0
        self.hangs = False

    async def call(self, method: str, request: Any) -> Any:
        if self.hangs:
            await trio.sleep_forever()
        if method == "GetMetrics":
            return agent_pb2.Metrics(metrics=self.metrics)
        if request.container_id != "web":
            raise RpcError(Code.NOT_FOUND, "a pause container")
        stats = agent_pb2.StatsContainerResponse()
        stats.cgroup_stats.cpu_stats.cpu_usage.total_usage = int(self.cpu * 1e9)
        stats.cgroup_stats.memory_stats.usage.usage = self.memory
        return stats


def sandbox_with(guest: Guest | None, **pids: int) -> Any:
    async def found() -> Guest:
        assert guest is not None
        return guest

    timeline = Timeline(0)
    timeline.marks = {"imported": 0.1, "container-started": 1.5}
    return SimpleNamespace(
        processes={"shim": os.getpid(), **pids},
        calls=Durations(),
        timeline=timeline,
        is_running=guest is not None,
        guest=found,
        containers={"pause": None, "web": None},
    )


def value(page: Page, name: str, labels: str = "") -> float:
    (found,) = [v for n, of, v in page.families[name].samples if (n, of) == (name, labels)]
    return float(found)


async def test_without_a_guest_the_hosts_figures_are_there() -> None:
    page = await page_of(sandbox_with(None))
    assert value(page, "kata_shim_threads") >= 1
    assert value(page, "process_open_fds") > 2
    assert value(page, "kata_shim_proc_status", 'item="vmrss"') > 1 << 20
    assert value(page, "kata_shim_boot_phase_milliseconds", 'kind="cold",phase="start"') == 1400
    assert not [name for name in page.families if name.startswith(("kata_guest", "kata_hyper"))]


async def test_a_process_that_is_gone_has_no_families() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    page = await page_of(sandbox_with(None, vmm=process.pid, virtiofsd=process.pid))
    assert not [name for name in page.families if name.startswith(("kata_hyper", "kata_virt"))]


async def test_a_guest_that_hangs_costs_its_own_figures(
    autojump_clock: trio.testing.MockClock,
) -> None:
    guest = Guest()
    guest.hangs = True
    page = await page_of(sandbox_with(guest))
    assert "kata_shim_threads" in page.families
    assert "kata_guest_load" not in page.families
    assert value(page, "kata_shim_vsock_bytes_total", 'direction="from_guest"') == 20


async def test_what_a_guest_makes_up_is_no_overhead_below_zero() -> None:
    guest = Guest()
    sandbox = sandbox_with(guest)
    await page_of(sandbox)
    guest.cpu = 1e6
    guest.memory = 1 << 60
    page = await page_of(sandbox)
    assert value(page, "kata_shim_pod_overhead_cpu") == 0
    assert value(page, "kata_shim_pod_overhead_memory_in_bytes") == 0


def test_overhead_is_what_the_containers_did_not_use() -> None:
    guest: Any = Guest()
    page = Page()
    overhead.add_overhead(page, guest, overhead.Snapshot(100, 10, {"a": 5, "b": 7}, 0), 0)
    assert "kata_shim_pod_overhead_cpu" not in page.families
    # b has ended and c has begun: 2 s of a and 1 s of c out of 5 s, in 10 s
    after = overhead.Snapshot(110, 15, {"a": 7, "c": 1}, 30 << 20)
    page = Page()
    overhead.add_overhead(page, guest, after, 100 << 20)
    assert value(page, "kata_shim_pod_overhead_cpu") == pytest.approx(20)
    assert value(page, "kata_shim_pod_overhead_memory_in_bytes") == 70 << 20


def test_a_process_counts_with_what_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        while len(both := procfs.with_descendants(parent.pid)) < 2:
            assert parent.poll() is None
        total = procfs.read(both)
        alone = procfs.read([parent.pid])
        assert total.threads == 2
        assert total.fds > alone.fds > 2
        assert total.status["vmrss"] > alone.status["vmrss"] > 1 << 20
        parent.communicate(b"\n")
    assert procfs.read(both).threads == 0


def test_a_pid_that_is_anothers_now_is_not_the_sandboxs() -> None:
    own = os.getpid()
    started = state.start_time(own)
    known = {"shim": (own, started), "vmm": (own, 1), "virtiofsd": (1 << 22, started)}
    sandbox = SimpleNamespace(_record=SimpleNamespace(processes=known))
    assert Sandbox.processes.fget(sandbox) == {"shim": own}  # type: ignore[attr-defined]
