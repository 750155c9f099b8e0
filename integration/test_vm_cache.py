# SPDX-License-Identifier: Apache-2.0
"""Sandboxes whose VM was kept ready by kata-vm-cache."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.lib.kata import Kata, wait_until
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

    def start(self) -> None:
        program = self.templates.prefix / "bin/kata-vm-cache"
        with self.templates.file.with_name("cache.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--config", self.templates.file], stdout=log, stderr=log
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


def _parent(pid: int) -> bytes:
    """The command line of its parent."""
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "PPid:" in x)
    return Path(f"/proc/{line.split()[1]}/cmdline").read_bytes()


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.one_edition
def test_the_end_of_the_cache_harms_no_sandbox(kata: Kata, cache: Cache, number: int) -> None:
    container = kata.start("sleep", "1000", flags=cache.templates.flags)
    assert started(kata, container) == "cache"
    cache.wait_full()
    (pooled,) = cache.ready()
    cache.end(number)
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
