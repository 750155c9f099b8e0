# SPDX-License-Identifier: Apache-2.0
"""The VM's size under KVM: vCPUs and memory come, vCPUs go again, in a booted VM and a clone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.kvmlab.suite.system import command_line, kata_configuration
from integration.lib.kata import Kata, wait_until

_MIB = 1 << 20


@pytest.fixture(params=["boot", "clone"])
def flags(request: pytest.FixtureRequest) -> Iterator[tuple[str | Path, ...]]:
    """For `ctr run`."""
    if request.param == "boot":
        yield ("--runtime-config-path", kata_configuration("[factory]\nenable_template = false\n"))
        return
    configuration = kata_configuration("[factory]\nenable_template = true\n")
    factory = ["kata-runtime", "--config", str(configuration), "factory"]
    subprocess.run([*factory, "init"], check=True, timeout=300)
    yield ("--runtime-config-path", configuration)
    subprocess.run([*factory, "destroy"], check=True)


def vcpus(kata: Kata, container_id: str) -> int:
    return int(kata.execute(container_id, "nproc").stdout)


def memory_mib(kata: Kata, container_id: str) -> int:
    words = kata.execute(container_id, "grep", "MemTotal", "/proc/meminfo").stdout.split()
    return int(words[1]) >> 10


def test_the_size_follows_the_containers(
    kata: Kata, flags: tuple[str | Path, ...], request: pytest.FixtureRequest
) -> None:
    with kata.pod(flags) as pod:
        words = command_line(pod.vmm_pid)
        assert words[words.index("-accel") + 1] == "kvm"
        assert ("-incoming" in words) is ("clone" in request.node.name)
        first = pod.start("sleep", "1000", flags=flags)
        before = memory_mib(kata, first)
        assert vcpus(kata, first) == 1
        for _ in range(2):  # what was unplugged can be plugged again
            second = pod.start("sleep", "1000", flags=(*flags, "--cpus", "1"))
            assert vcpus(kata, first) == 2
            busy = "taskset 2 sh -c 'i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; echo $i'"
            assert kata.execute(first, "sh", "-c", busy).stdout == "1000\n"
            kata.remove(second)
            pod.members.remove(second)
            wait_until(lambda: vcpus(kata, first) == 1, 10, "the vCPU is gone")
        limit = ("--memory-limit", str(512 * _MIB))
        third = pod.start("sleep", "1000", flags=(*flags, *limit))
        wait_until(lambda: memory_mib(kata, first) >= before + 496, 10, "the memory is there")
        assert memory_mib(kata, first) <= before + 528
        fill = "dd if=/dev/zero of=/dev/shm/f bs=1M count=32 2>/dev/null; stat -c %s /dev/shm/f"
        assert kata.execute(third, "sh", "-c", fill).stdout == f"{32 * _MIB}\n"


ELASTIC = """\
[factory]
enable_template = false
[hypervisor.qemu]
enable_virtio_mem = true
reclaim_guest_freed_memory = true
"""


def kept_mib(pid: int) -> int:
    """How much of its guest's memory the host has to keep."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:"):
            status = entry.stat()
            found[status.st_ino] = status.st_blocks * 512
    return sum(found.values()) // _MIB


def test_memory_goes_back_to_the_host(kata: Kata) -> None:
    """What is freed by the balloon's free page reporting, what is not asked for by virtio-mem."""
    flags = ("--runtime-config-path", kata_configuration(ELASTIC))
    with kata.pod(flags) as pod:
        first = pod.start("sleep", "1000", flags=flags)
        before = memory_mib(kata, first)
        script = "until [ -e /go ]; do sleep 1; done; dd if=/dev/zero bs=64M count=1 |"
        script += " until [ -e /end ]; do sleep 1; done"
        limit = ("--memory-limit", str(384 * _MIB))
        greedy = pod.start("sh", "-c", f"{script}; exec sleep 1000", flags=(*flags, *limit))
        wait_until(lambda: memory_mib(kata, first) >= before + 368, 10, "the memory is there")
        own = kept_mib(pod.vmm_pid)
        kata.execute(greedy, "touch", "/go")
        wait_until(lambda: kept_mib(pod.vmm_pid) >= own + 60, 20, "it is used")
        kata.execute(greedy, "touch", "/end")
        # The guest reports ranges of 2 MiB only; some of them still have a page in use.
        wait_until(lambda: kept_mib(pod.vmm_pid) <= own + 32, 20, "what was freed is the host's")
        kata.remove(greedy)
        pod.members.remove(greedy)
        wait_until(lambda: memory_mib(kata, first) <= before + 16, 20, "all of it is gone")
