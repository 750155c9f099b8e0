# SPDX-License-Identifier: Apache-2.0
"""When things break: the task ends with an exit event, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.conftest import make_containerd
from integration.lib.containerd import Containerd
from integration.lib.kata import EventLog, Kata, wait_until
from integration.lib.leftovers import left_by

LOST = 255
SOON = 2.0  # seconds (DESIGN decision 12)
HUNG = 30.0


@pytest.fixture
def events(containerd: Containerd) -> Iterator[EventLog]:
    log = EventLog(containerd)
    yield log
    log.close()


def kill_process(name: str) -> Callable[[Kata, str], None]:
    """SIGKILL one of the sandbox's processes on the host."""

    def fault(kata: Kata, container_id: str) -> None:
        os.kill(kata.pid_of(container_id, name), signal.SIGKILL)

    return fault


@pytest.mark.parametrize(
    "fault", [kill_process("vmm"), kill_process("virtiofsd")], ids=["vmm", "virtiofsd"]
)
def test_a_lost_helper_ends_the_task(kata: Kata, events: EventLog, fault) -> None:
    container_id = kata.start("sleep", "1000")
    fault(kata, container_id)
    wait_until(lambda: kata.status(container_id) == "STOPPED", SOON, "the task is stopped")
    wait_until(lambda: "/tasks/exit" in events.topics(container_id), SOON, "an exit event")
    assert kata.delete(container_id) == LOST
    kata.ctr("container", "rm", container_id)
    log = kata.containerd.log.read_text().splitlines()
    assert sum("sandbox lost: " in line and container_id in line for line in log) == 1


def in_guest(prefix: Path, container_id: str, script: str) -> None:
    """Run a script as root of the guest, by the debug console; it may not come back."""
    subprocess.run(
        [prefix / "bin/kata-runtime", "exec", container_id],
        input=script.encode(),
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_a_panic_of_the_guest_s_kernel_ends_the_task(
    kata: Kata, events: EventLog, prefix: Path, with_console: Path
) -> None:
    container_id = kata.start("sleep", "1000", flags=("--runtime-config-path", with_console))
    in_guest(prefix, container_id, "echo c > /proc/sysrq-trigger\n")
    wait_until(lambda: kata.status(container_id) == "STOPPED", SOON + 2, "the task is stopped")
    wait_until(lambda: "/tasks/exit" in events.topics(container_id), SOON, "an exit event")
    assert kata.delete(container_id) == LOST


@pytest.mark.one_edition
def test_a_full_disk_of_the_host_stops_the_log_and_not_the_container(
    kata: Kata, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        container_id = kata.start(
            *("sh", "-c", "seq 1 2000000; echo end > /ended; sleep 1000"),
            flags=("--log-uri", f"file://{disk}/log"),
        )
        wait_until(
            lambda: kata.execute(container_id, "test", "-e", "/ended", check=False).returncode == 0,
            60,
            "the container wrote all it had",
        )
        assert (disk / "log").stat().st_size > 900_000
        kata.remove(container_id)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_an_exec_ends_with_its_lost_vm(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    process = kata.popen(
        *("task", "exec", "--exec-id", "e1", container_id, "sleep", "1000"),
        stdin=subprocess.DEVNULL,
    )
    wait_until(
        lambda: "sleep 1000" in kata.execute(container_id, "ps").stdout.replace("{", ""),
        10,
        "the exec runs",
    )
    os.kill(kata.pid_of(container_id, "vmm"), signal.SIGKILL)
    assert process.wait(10) == LOST


def test_a_killed_shim_leaves_nothing(kata: Kata, events: EventLog) -> None:
    container_id = kata.start("sleep", "1000")
    os.kill(kata.pid_of(container_id, "shim"), signal.SIGKILL)
    wait_until(lambda: "/tasks/exit" in events.topics(container_id), SOON + 1, "an exit event")
    wait_until(lambda: not Path(f"/run/vc/sbs/{container_id}").exists(), 5, "the state is gone")
    wait_until(lambda: kata.status(container_id) == "", 5, "the task is gone")
    kata.ctr("container", "rm", container_id)


@pytest.mark.one_edition
def test_a_hung_guest_is_lost(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    os.kill(kata.pid_of(container_id, "vmm"), signal.SIGSTOP)
    wait_until(lambda: kata.status(container_id) == "STOPPED", HUNG + 2, "the task is stopped")
    assert kata.delete(container_id) == LOST


def test_a_hung_guest_can_be_killed_at_once(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    os.kill(kata.pid_of(container_id, "vmm"), signal.SIGSTOP)
    before = time.monotonic()
    kata.ctr("task", "rm", "-f", container_id, check=False, timeout=60)
    assert time.monotonic() - before < HUNG / 2, "it was not waited for the guest to count as lost"
    kata.ctr("container", "rm", container_id)


class TestContainerdAway:
    """These stop their daemon, so they have one of their own."""

    @pytest.fixture
    def daemon(self, edition, prefix) -> Iterator[Containerd]:
        with make_containerd(edition, prefix) as containerd:
            yield containerd
        left = left_by(Kata.mark)
        assert not left, f"left behind: {left}"

    @pytest.mark.parametrize("kill", [False, True], ids=["restarted", "killed"])
    def test_a_container_outlives_its_containerd(self, daemon: Containerd, kill: bool) -> None:
        kata = Kata(daemon)
        container_id = kata.start("sleep", "1000")
        daemon.stop(kill=kill)
        daemon.start()
        assert kata.status(container_id) == "RUNNING"
        assert kata.execute(container_id, "echo", "hi").stdout == "hi\n"
        kata.close()

    def test_an_exit_while_containerd_is_away_is_known_afterwards(self, daemon: Containerd) -> None:
        kata = Kata(daemon)
        container_id = kata.start("sh", "-c", "sleep 1; exit 5")
        daemon.stop()
        wait_until(lambda: not vm_runs(container_id), 30, "the container has ended")
        daemon.start()
        assert kata.status(container_id) == "STOPPED"
        assert kata.delete(container_id) == 5
        kata.close()

    def test_a_shim_that_died_meanwhile_is_cleaned_up(self, daemon: Containerd) -> None:
        kata = Kata(daemon)
        container_id = kata.start("sleep", "1000")
        shim = kata.pid_of(container_id, "shim")
        daemon.stop()
        os.kill(shim, signal.SIGKILL)
        daemon.start()
        wait_until(lambda: not Path(f"/run/vc/sbs/{container_id}").exists(), 10, "state removed")
        kata.ctr("container", "rm", container_id)


def vm_runs(container_id: str) -> bool:
    """Whether the sandbox still has a VMM."""
    try:
        text = Path(f"/run/vc/sbs/{container_id}/state.json").read_text()
    except OSError:
        return False
    import json

    pid = json.loads(text)["processes"].get("vmm", [0])[0]
    return pid > 0 and Path(f"/proc/{pid}").exists()
