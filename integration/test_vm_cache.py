# SPDX-License-Identifier: Apache-2.0
"""Sandboxes whose VM was kept ready by kata-vm-cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from integration.conftest import edition_named
from integration.lib.cri import CriNode
from integration.lib.kata import Kata, parent_of, wait_until
from integration.lib.leftovers import left_by
from integration.lib.templates import Templates, console, kind_of, started

_READY_SHIMS = Path("/run/vc/ready-shims")
_READY_WITHIN = 120  # seconds for a template and the VMs, on a busy host


class Cache:
    """A kata-vm-cache of the test's own."""

    def __init__(self, templates: Templates, number: int) -> None:
        self.templates = templates
        self.number = number
        templates.set(
            "factory",
            vm_cache_number=number,
            vm_cache_endpoint=str(templates.file.with_name("cache.sock")),
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.templates.file.with_name("cache.log").read_text()

    def start(self, launcher: Sequence[str] = ()) -> None:
        """Args: launcher: of the containerd whose shims it is to keep ready."""
        program = self.templates.prefix / "bin/kata-vm-cache"
        with self.templates.file.with_name("cache.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*launcher, program, "--config", self.templates.file], stdout=log, stderr=log
            )
        self.wait_full()

    def ready(self) -> list[int]:
        """Pids of the VMs that wait."""
        lines = self.templates.command("status").stdout.splitlines()
        return [int(line.split()[2]) for line in lines if line.startswith("cached VM ")]

    def wait_full(self) -> None:
        """Until all VMs wait, and shims are kept ready."""
        wait_until(lambda: bool(list(_READY_SHIMS.glob("*/sock"))), _READY_WITHIN, "ready shims")
        wait_until(lambda: len(self.ready()) == self.number, _READY_WITHIN, "the cache is full")

    def end(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(30)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGTERM)


@pytest.fixture
def cache(kata: Kata, templates: Templates) -> Iterator[Cache]:
    """A full cache of one VM; whatever it leaves fails the test."""
    cache = Cache(templates, 1)
    try:
        cache.start()
        yield cache
        kata.close()  # whose VMs bear the cache's names
    finally:
        cache.close()
    left = left_by("cache-")
    assert not left, f"left behind: {left}"


def _parent_pid(pid: int) -> int:
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "PPid:" in x)
    return int(line.split()[1])


def _parent(pid: int) -> bytes:
    """The command line of its parent."""
    return Path(f"/proc/{parent_of(pid)}/cmdline").read_bytes()


def test_a_cached_vm_is_used_once_and_replaced(kata: Kata, cache: Cache) -> None:
    (pid,) = cache.ready()
    first = kata.start("sleep", "1000", flags=cache.templates.flags)
    assert started(kata, first) == "cache"
    assert kata.pid_of(first, "vmm") == pid
    assert b"shimv2.ready" in _parent(kata.pid_of(first, "shim"))
    assert kata.execute(first, "echo", "alive").stdout == "alive\n"
    cache.wait_full()
    assert pid not in cache.ready()
    second = kata.start("sleep", "1000", flags=cache.templates.flags)
    assert started(kata, second) == "cache"
    texts = [
        console(
            cache.templates.prefix, name, "echo boot=$(cat /proc/sys/kernel/random/boot_id)\nexit\n"
        )
        for name in (first, second)
    ]
    assert len(texts[0]["boot"]) == 36
    assert texts[0] != texts[1]


def test_it_lives_in_the_pod_s_cgroups_and_network(kata: Kata, cache: Cache) -> None:
    container = kata.start("sleep", "1000", flags=cache.templates.flags)
    assert started(kata, container) == "cache"
    vmm = kata.pid_of(container, "vmm")
    assert container in Path(f"/proc/{vmm}/cgroup").read_text()
    row = kata.ctr("task", "list").stdout
    told = next(int(line.split()[1]) for line in row.splitlines() if line.startswith(container))
    assert told == kata.pid_of(container, "holder")
    assert os.readlink(f"/proc/{told}/ns/net") != os.readlink("/proc/self/ns/net")
    os.kill(told, signal.SIGKILL)
    wait_until(lambda: kata.status(container) == "STOPPED", 10, "its sandbox ends with it")


def test_a_pod_gets_its_network(templates: Templates, prefix: Path) -> None:
    """The NIC, with a tap of the pod's namespace, is plugged into a VM that is not in there."""
    cache = Cache(templates, 1)
    with CriNode(edition_named("go"), prefix, configuration=templates.file) as node:
        try:
            cache.start(node.host.launcher)
            (vmm,) = cache.ready()
            pod = node.run_pod()
            record = json.loads(Path(f"/run/vc/sbs/{pod}/state.json").read_text())["processes"]
            assert record["vmm"][0] == vmm
            assert b"shimv2.ready" in _parent(record["shim"][0])
            text = "mkdir /w; echo hello >/w/index.html; exec httpd -f -p 80 -h /w"
            container = node.start_container(pod, "sh", "-c", text)
            listening = lambda: ":80 " in node.execute(container, "netstat", "-ltn")  # noqa: E731
            wait_until(listening, 10, "the server listens")
            assert node.address(pod) in node.execute(container, "ip", "address", "show", "eth0")
            url = f"http://{node.address(pod)}/"
            with node.host.call(lambda: urllib.request.urlopen(url, timeout=10)) as answer:
                assert answer.read() == b"hello\n"
            node.remove_pod(pod)
            wait_until(lambda: not Path(f"/proc/{vmm}").exists(), 10, "the VM is gone")
        finally:
            cache.close()
        left = node.clean()
        assert not left, f"left behind: {left}"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.one_edition
def test_the_end_of_the_cache_harms_no_sandbox(kata: Kata, cache: Cache, number: int) -> None:
    container = kata.start("sleep", "1000", flags=cache.templates.flags)
    assert started(kata, container) == "cache"
    cache.wait_full()
    (pooled,) = cache.ready()
    nursery = _parent_pid(kata.pid_of(container, "shim"))
    cache.end(number)
    wait_until(lambda: not Path(f"/proc/{nursery}").exists(), 10, "no shims are kept ready")
    wait_until(lambda: not Path(f"/proc/{pooled}").exists(), 10, "the pooled VM is gone")
    assert kata.execute(container, "echo", "alive").stdout == "alive\n"
    # Without a cache the next sandbox is cloned; a new cache clears what the old one left.
    other = kata.new_id()
    kata.run("true", flags=cache.templates.flags, container_id=other)
    assert kind_of(kata.containerd, other) == "template"
    cache.start()


@pytest.mark.one_edition
def test_a_sandbox_from_the_cache_ends_with_its_shim(kata: Kata, cache: Cache) -> None:
    container = kata.start("sleep", "1000", flags=cache.templates.flags)
    vmm, shim = kata.pid_of(container, "vmm"), kata.pid_of(container, "shim")
    os.kill(shim, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{vmm}").exists(), 10, "the VM is gone")


@pytest.mark.one_edition
def test_a_pooled_vm_that_dies_is_replaced(kata: Kata, cache: Cache) -> None:
    (pid,) = cache.ready()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cache.ready() not in ([], [pid]), _READY_WITHIN, "another is ready")
    container = kata.new_id()
    kata.run("true", flags=cache.templates.flags, container_id=container)
    assert kind_of(kata.containerd, container) == "cache"


@pytest.mark.one_edition
def test_another_configuration_does_not_fit(kata: Kata, cache: Cache) -> None:
    cache.templates.set("hypervisor.qemu", default_memory=1024)
    container = kata.new_id()
    kata.run("true", flags=cache.templates.flags, container_id=container)
    assert kind_of(kata.containerd, container) == "cold"


@pytest.mark.one_edition
def test_only_one_cache_at_a_place(cache: Cache) -> None:
    program = cache.templates.prefix / "bin/kata-vm-cache"
    done = subprocess.run(
        [program, "--config", cache.templates.file],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "another VM cache serves" in done.stderr
    assert len(cache.ready()) == 1


@pytest.mark.one_edition
def test_nothing_to_keep_is_an_error(templates: Templates) -> None:
    templates.set("factory", vm_cache_number=0, ready_shims=False)
    program = templates.prefix / "bin/kata-vm-cache"
    done = subprocess.run(
        [program, "--config", templates.file],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "vm_cache_number" in done.stderr
