# SPDX-License-Identifier: Apache-2.0
"""Several containers in one VM, joined by CRI's annotations."""

from __future__ import annotations

from pathlib import Path

from integration.lib.kata import Kata, wait_until


def test_containers_of_a_pod_share_one_vm(kata: Kata) -> None:
    with kata.pod() as pod:
        one, two = pod.start("sleep", "1000"), pod.start("sleep", "1000")
        boots = [
            kata.execute(c, "cat", "/proc/sys/kernel/random/boot_id").stdout for c in (one, two)
        ]
        assert boots[0] == boots[1]
        assert pod.vmm_pid == kata.pid_of(pod.id, "vmm")


def test_one_leaves_and_the_others_stay(kata: Kata) -> None:
    with kata.pod() as pod:
        one, two = pod.start("sleep", "1000"), pod.start("sleep", "1000")
        kata.remove(one)
        assert kata.execute(two, "echo", "here").stdout == "here\n"
        three = pod.start("sleep", "1000")
        assert kata.execute(three, "echo", "new").stdout == "new\n"
        assert pod.vmm_pid == kata.pid_of(pod.id, "vmm")


def test_the_exit_of_a_member_does_not_end_the_pod(kata: Kata) -> None:
    with kata.pod() as pod:
        one = pod.start("sh", "-c", "exit 4")
        wait_until(lambda: kata.status(one) == "STOPPED", 20, "it has ended")
        assert kata.delete(one) == 4
        two = pod.start("sleep", "1000")
        assert kata.execute(two, "echo", "here").stdout == "here\n"


def test_the_end_of_the_pause_container_ends_all(kata: Kata) -> None:
    with kata.pod() as pod:
        one = pod.start("sleep", "1000")
        kata.ctr("task", "kill", "-s", "KILL", pod.id)
        wait_until(lambda: kata.status(one) == "STOPPED", 10, "the member has ended")
        wait_until(lambda: not Path(f"/proc/{pod.vmm_pid}").exists(), 5, "the VMM is gone")


def test_the_names_of_other_containers_are_not_visible(kata: Kata) -> None:
    with kata.pod() as pod:
        one = pod.start("sh", "-c", "sleep 4321")
        two = pod.start("sleep", "1000")
        assert "4321" not in kata.execute(two, "ps").stdout
        assert "4321" in kata.execute(one, "ps").stdout
