# SPDX-License-Identifier: Apache-2.0
"""The VM follows what its containers ask for, and the guest's cgroups hold them to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.lib.configuration import Configuration
from integration.lib.containerd import Containerd
from integration.lib.kata import EventLog, Kata, Pod, wait_until

_MIB = 1 << 20

needs_two_cpus = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the host has one CPU")


@pytest.fixture
def events(containerd: Containerd) -> Iterator[EventLog]:
    log = EventLog(containerd)
    yield log
    log.close()


def _memory_mib(kata: Kata, container_id: str) -> int:
    words = kata.execute(container_id, "grep", "MemTotal", "/proc/meminfo").stdout.split()
    return int(words[1]) >> 10


def _wait_memory(kata: Kata, container_id: str, mib: int) -> None:
    """The guest's kernel takes a moment; it keeps a little of it for itself."""
    wait_until(lambda: _memory_mib(kata, container_id) >= mib - 16, 10, f"{mib} MiB of memory")
    assert _memory_mib(kata, container_id) <= mib + 16


@needs_two_cpus
def test_a_quota_brings_a_vcpu(kata: Kata) -> None:
    assert kata.run("nproc").stdout.strip() == "1"
    assert kata.run("nproc", flags=("--cpus", "1")).stdout.strip() == "2"


def test_memory_grows_by_the_sum_of_the_limits(kata: Kata) -> None:
    with kata.pod() as pod:
        first = pod.start("sleep", "1000")
        before = _memory_mib(kata, first)
        for count in (1, 2):
            pod.start("sleep", "1000", flags=("--memory-limit", str(256 * _MIB)))
            _wait_memory(kata, first, before + 256 * count)


def test_a_limit_that_no_host_has_is_refused(kata: Kata) -> None:
    done = kata.run("true", flags=("--memory-limit", str(1 << 50)), check=False)
    assert done.returncode != 0
    assert "1073741824 MiB" in done.stderr
    assert "default_maxmemory" in done.stderr


class Loops:
    """Containers that count as fast as they can, and tell how far they are."""

    def __init__(self, kata: Kata, directory: Path) -> None:
        self._kata = kata
        self._directory = directory
        self._containers: dict[str, str] = {}

    def add(self, pod: Pod, name: str, *flags: str) -> str:
        """Returns the container's id."""
        file = self._directory / name
        script = f"i=0; trap 'echo $i >> /out/{name}' USR1; : > /out/{name};"
        script += " while :; do i=$((i+1)); done"
        mount = f"type=bind,src={self._directory},dst=/out,options=rbind:rw"
        self._containers[name] = pod.start("sh", "-c", script, flags=("--mount", mount, *flags))
        wait_until(file.exists, 10, f"{name} counts")
        return self._containers[name]

    def remove(self, container: str) -> None:
        self._containers = {n: c for n, c in self._containers.items() if c != container}
        self._kata.remove(container)

    def speeds(self, seconds: float) -> dict[str, float]:
        """Rounds a second of each."""
        first, begin = self._counts(), time.monotonic()
        time.sleep(seconds)  # in which they work
        second, end = self._counts(), time.monotonic()
        return {name: (second[name] - first[name]) / (end - begin) for name in first}

    def _counts(self) -> dict[str, int]:
        files = {name: self._directory / name for name in self._containers}
        for file in files.values():
            file.write_text("")
        for container in self._containers.values():
            self._kata.ctr("task", "kill", "-s", "SIGUSR1", container)

        def counts() -> dict[str, int]:
            texts = {name: file.read_text() for name, file in files.items()}
            return {name: int(text) for name, text in texts.items() if text.endswith("\n")}

        wait_until(lambda: len(counts()) == len(self._containers), 10, "all have told")
        return counts()


@needs_two_cpus
@pytest.mark.one_edition
def test_a_container_gets_its_share_of_work(kata: Kata, tmp_path: Path) -> None:
    """min(vCPUs, quota): a VM of one vCPU uses one, and 0.4 of a CPU is 0.4 of what one does."""
    loops = Loops(kata, tmp_path)
    with kata.pod() as pod:
        loops.add(pod, "free")
        second = loops.add(pod, "second")
        before, begin = _cpu_seconds(pod.vmm_pid), time.monotonic()
        loops.speeds(5)
        used = (_cpu_seconds(pod.vmm_pid) - before) / (time.monotonic() - begin)
        assert used < 1.25, "two loops, one vCPU, two CPUs of the host"
        loops.remove(second)
        loops.add(pod, "limited", "--cpus", "0.4")  # which brings a vCPU
        speed = loops.speeds(5)
        # On a busy host the loop that never sleeps gets less of its CPU than the other.
        assert 0.2 < speed["limited"] / speed["free"] < 0.7, speed


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


_SMALL_VM = ("--annotation", "io.katacontainers.config.hypervisor.default_memory=256")


def _takes(kata: Kata, container: str, mib: int) -> bool:
    """Whether a process there gets so much memory; it is killed if not."""
    words = ("dd", "if=/dev/zero", "of=/dev/null", f"bs={mib}M", "count=1")
    done = kata.execute(container, *words, check=False)
    assert done.returncode in (0, 137), done.stderr
    return done.returncode == 0


@pytest.mark.one_edition
def test_both_walls_of_memory(kata: Kata, events: EventLog) -> None:
    """min(VM, limit), by how much a process can use before it is killed."""
    with kata.pod(flags=_SMALL_VM) as pod:
        limited = pod.start("sleep", "1000", flags=("--memory-limit", str(64 * _MIB)))
        free = pod.start("sleep", "1000")
        assert _takes(kata, limited, 48)
        assert not _takes(kata, limited, 80)
        wait_until(lambda: "/tasks/oom" in events.topics(limited), 5, "TaskOOM of the limited one")
        assert "/tasks/oom" not in events.topics(free)
        assert _takes(kata, free, 192)
        # The VM has 256 MiB, and the 64 of the other's limit, which come as 128.
        taken = kata.execute(free, "tail", "/dev/zero", check=False)
        assert taken.returncode == 137, taken.stderr
        for container in (limited, free):
            assert kata.execute(container, "echo", "alive").stdout == "alive\n"
            assert kata.status(container) == "RUNNING"


def test_who_takes_too_much_memory_is_killed_alone(kata: Kata, events: EventLog) -> None:
    with kata.pod() as pod:
        other = pod.start("sleep", "1000")
        greedy = pod.start(
            *("sh", "-c", "exec tail /dev/zero"), flags=("--memory-limit", str(64 * _MIB))
        )
        wait_until(lambda: kata.status(greedy) == "STOPPED", 60, "it was killed")
        wait_until(lambda: "/tasks/oom" in events.topics(greedy), 5, "TaskOOM")
        assert kata.delete(greedy) == 137
        pod.members.remove(greedy)
        assert kata.status(other) == "RUNNING"
        assert kata.execute(other, "echo", "alive").stdout == "alive\n"


@pytest.mark.one_edition
def test_a_container_that_may_swap(kata: Kata, prefix: Path, tmp_path: Path) -> None:
    """By annotations; its limit and 128 MiB of swap are what it gets."""
    configuration = Configuration(prefix, tmp_path)
    configuration.set("factory", enable_template=False)
    swap = {"enable_guest_swap": True, "guest_swap_path": f"{tmp_path}/swap"}
    configuration.set("hypervisor.qemu", **swap)
    limit = ("--memory-limit", str(64 * _MIB))
    asks = "io.katacontainers.container.resource"
    with kata.pod(flags=configuration.flags) as pod:
        flags = (*configuration.flags, *limit)
        swaps = pod.start(
            *("sleep", "1000"),
            flags=(
                *flags,
                *("--annotation", f"{asks}.swappiness=60"),
                *("--annotation", f"{asks}.swap_in_bytes={192 * _MIB}"),
            ),
        )
        words = kata.execute(swaps, "grep", "SwapTotal", "/proc/meminfo").stdout.split()
        assert int(words[1]) == 128 << 10
        assert _takes(kata, swaps, 128)
        assert not _takes(kata, swaps, 220)
        assert not list((tmp_path / "swap").iterdir()), "the file has no name"
