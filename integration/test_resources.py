# SPDX-License-Identifier: Apache-2.0
"""The VM follows what its containers ask for, and the guest's cgroups hold them to it."""

from __future__ import annotations

import os

import pytest

from integration.lib.kata import Kata, wait_until

_MIB = 1 << 20
_HALF_A_CPU = ("--cpus", "0.5")

needs_two_cpus = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the host has one CPU")


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


def test_a_container_gets_its_quota_of_cpu_time(kata: Kata) -> None:
    """Measured by what a busy loop has used, not by what a file says."""
    container_id = kata.start("sh", "-c", "while :; do :; done", flags=_HALF_A_CPU)
    script = "s=$(cut -d' ' -f1 /proc/uptime); a=$(cut -d' ' -f14,15 /proc/1/stat); sleep 6; "
    script += "echo $s $a $(cut -d' ' -f1 /proc/uptime) $(cut -d' ' -f14,15 /proc/1/stat)"
    begin, user, system, end, user_after, system_after = map(
        float, kata.execute(container_id, "sh", "-c", script).stdout.split()
    )
    used = (user_after + system_after - user - system) / 100
    assert 0.35 < used / (end - begin) < 0.6


def test_who_takes_too_much_memory_is_killed_alone(kata: Kata) -> None:
    with kata.pod() as pod:
        other = pod.start("sleep", "1000")
        greedy = pod.start(
            *("sh", "-c", "exec tail /dev/zero"), flags=("--memory-limit", str(64 * _MIB))
        )
        wait_until(lambda: kata.status(greedy) == "STOPPED", 60, "it was killed")
        assert kata.delete(greedy) == 137
        pod.members.remove(greedy)
        assert kata.status(other) == "RUNNING"
        assert kata.execute(other, "echo", "alive").stdout == "alive\n"
