# SPDX-License-Identifier: Apache-2.0
"""When things break under KVM and vhost-vsock: the task ends, and nothing is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.kvmlab.suite.system import SystemContainerd, modules
from integration.lib.kata import EventLog, Kata, wait_until

LOST = 255
SOON = 2.0  # seconds
HUNG = 30.0


@pytest.fixture
def events(system: SystemContainerd) -> Iterator[EventLog]:
    log = EventLog(system)
    yield log
    log.close()


@pytest.mark.parametrize("name", ["vmm", "virtiofsd"])
def test_a_lost_helper_ends_the_task(kata: Kata, events: EventLog, name: str) -> None:
    container_id = kata.start("sleep", "1000")
    os.kill(kata.pid_of(container_id, name), signal.SIGKILL)
    wait_until(lambda: kata.status(container_id) == "STOPPED", SOON, "the task is stopped")
    wait_until(lambda: "/tasks/exit" in events.topics(container_id), SOON, "an exit event")
    assert kata.delete(container_id) == LOST
    kata.ctr("container", "rm", container_id)


def test_a_killed_shim_leaves_nothing(kata: Kata, events: EventLog) -> None:
    container_id = kata.start("sleep", "1000")
    vmm = kata.pid_of(container_id, "vmm")
    os.kill(kata.pid_of(container_id, "shim"), signal.SIGKILL)
    wait_until(lambda: "/tasks/exit" in events.topics(container_id), SOON + 1, "an exit event")
    wait_until(lambda: kata.status(container_id) == "", 5, "the task is gone")
    wait_until(lambda: not Path(f"/run/vc/sbs/{container_id}").exists(), 5, "the state is gone")
    assert not Path(f"/proc/{vmm}").exists()
    kata.ctr("container", "rm", container_id)
    wait_until(lambda: modules()["vhost_vsock"] == 0, 15, "nobody holds /dev/vhost-vsock")


def test_a_hung_guest_is_lost(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    os.kill(kata.pid_of(container_id, "vmm"), signal.SIGSTOP)
    wait_until(lambda: kata.status(container_id) == "STOPPED", HUNG + 2, "the task is stopped")
    assert kata.delete(container_id) == LOST
    kata.ctr("container", "rm", container_id)


@pytest.mark.parametrize("kill", [False, True], ids=["restarted", "killed"])
def test_a_container_outlives_its_containerd(kata: Kata, kill: bool) -> None:
    container_id = kata.start("sleep", "1000")
    shim = kata.pid_of(container_id, "shim")
    kata.containerd.stop(kill=kill)
    kata.containerd.start()
    assert kata.status(container_id) == "RUNNING"
    assert kata.pid_of(container_id, "shim") == shim
    assert kata.execute(container_id, "echo", "hi").stdout == "hi\n"
    kata.remove(container_id)
