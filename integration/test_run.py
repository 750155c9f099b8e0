# SPDX-License-Identifier: Apache-2.0
"""Containers in VMs, as `ctr` users see them."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import signal
import subprocess
import time

import pytest

from integration.lib.containerd import RUNTIME, Containerd
from integration.lib.images import BUSYBOX_REFERENCE
from integration.lib.kata import EventLog, Kata, wait_until


def test_it_runs_on_another_kernel(kata: Kata) -> None:
    guest = kata.run("uname", "-r").stdout.strip()
    assert guest
    assert guest != platform.release()


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_the_exit_status_is_the_process_s(kata: Kata, status: int) -> None:
    assert kata.run("sh", "-c", f"exit {status}", check=False).returncode == status


def test_a_signal_is_128_and_its_number(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    kata.ctr("task", "kill", "-s", "SIGKILL", container_id)
    wait_until(lambda: kata.status(container_id) == "STOPPED", 10, "the container is stopped")
    assert kata.delete(container_id) == 137


def test_stdout_and_stderr_are_kept_apart(kata: Kata) -> None:
    done = kata.run("sh", "-c", "echo out; echo err >&2")
    assert done.stdout == "out\n"
    assert "err" in done.stderr


def test_output_just_before_the_exit_is_never_lost(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    for _ in range(20):
        done = kata.execute(container_id, "sh", "-c", "seq 1 20000; exit 3", check=False)
        assert done.returncode == 3
        assert done.stdout.splitlines()[-1] == "20000"


@pytest.mark.slow
def test_a_gibibyte_of_output_arrives_whole(kata: Kata) -> None:
    command = "dd if=/dev/zero bs=1M count=1024 2>/dev/null"
    process = kata.popen(
        *("run", "--rm", "--runtime", RUNTIME, BUSYBOX_REFERENCE, kata.new_id()),
        *("sh", "-c", command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    digest, size = hashlib.sha256(), 0
    while chunk := process.stdout.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
    assert process.wait() == 0
    assert size == 1 << 30
    expected = hashlib.sha256()
    for _ in range(1024):
        expected.update(bytes(1 << 20))
    assert digest.digest() == expected.digest()


def test_stdin_arrives_and_ends(kata: Kata) -> None:
    data = os.urandom(3 << 20)
    done = kata.run("sha256sum", input=data)
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest()


def test_a_container_that_writes_while_nobody_reads_waits(kata: Kata) -> None:
    container_id = kata.start("sh", "-c", "dd if=/dev/zero bs=1M count=64; echo done >&2")
    assert kata.execute(container_id, "true").returncode == 0
    assert kata.status(container_id) == "RUNNING"
    done = kata.ctr("task", "attach", container_id)
    assert len(done.stdout) == 64 << 20


def test_a_client_may_leave_and_another_attach(kata: Kata) -> None:
    script = "while read line; do echo got $line; done"
    process = kata.popen(
        *("run", "--runtime", RUNTIME, BUSYBOX_REFERENCE, (container_id := kata.new_id())),
        *("sh", "-c", script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"got one\n"
    process.kill()
    process.wait()
    assert kata.status(container_id) == "RUNNING"
    with kata.popen(
        "task", "attach", container_id, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as again:
        assert again.stdin is not None and again.stdout is not None
        again.stdin.write(b"two\n")
        again.stdin.flush()
        assert again.stdout.readline() == b"got two\n"
        again.kill()
    assert kata.status(container_id) == "RUNNING"


def test_the_guest_s_clock_is_the_host_s(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    before = time.time()
    stamp = kata.execute(
        container_id, "sh", "-c", "touch /dev/shm/now; stat -c %y /dev/shm/now"
    ).stdout
    guest = datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d*.*", r"\1+00:00", stamp.strip()))
    assert before - 0.1 <= guest.timestamp() <= time.time() + 0.1


class TestExec:
    def test_its_status_and_output(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        done = kata.execute(container_id, "sh", "-c", "echo hi; exit 7", check=False)
        assert (done.returncode, done.stdout) == (7, "hi\n")

    def test_it_ends_though_a_descendant_holds_the_pipe(
        self, kata: Kata, containerd: Containerd
    ) -> None:
        container_id = kata.start("sleep", "1000")
        events = EventLog(containerd)
        # Newer `ctr` waits for the end of the pipe, also with runc: what counts is the event.
        process = kata.popen(
            *("task", "exec", "--exec-id", "short", container_id),
            *("sh", "-c", "echo before; sleep 1000 &"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"before\n"
            wait_until(lambda: "/tasks/exit" in events.topics(container_id), 5, "its exit event")
            assert "sleep 1000" in kata.execute(container_id, "ps").stdout
        finally:
            process.kill()
            process.wait()
            events.close()

    def test_user_directory_and_environment(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000", flags=("--env", "A=b"))
        done = kata.execute(
            container_id,
            "sh",
            "-c",
            "id -u; pwd; echo $A",
            flags=("--user", "1000", "--cwd", "/tmp"),
        )
        assert done.stdout.split() == ["1000", "/tmp", "b"]

    def test_a_program_that_does_not_exist(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        done = kata.execute(container_id, "/nonesuch", check=False)
        assert done.returncode != 0
        assert "/nonesuch" in done.stderr

    def test_many_one_after_the_other(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        for number in range(30):
            assert kata.execute(container_id, "echo", str(number)).stdout == f"{number}\n"
        processes = kata.execute(container_id, "ps").stdout
        assert len(processes.splitlines()) <= 4


class TestTerminal:
    def test_it_has_one_and_follows_its_size(self, kata: Kata) -> None:
        script = (
            "tty; for i in $(seq 100); do size=$(stty size); echo $size;"
            ' test "$size" = "30 100" && exit; sleep 0.1; done'
        )
        done = _with_terminal(kata, "run", "--rm", "--runtime", RUNTIME, "-t", BUSYBOX_REFERENCE,
                              kata.new_id(), "sh", "-c", script, resized=(30, 100))  # fmt: skip
        assert "/dev/pts/0" in done
        assert "24 80" in done
        assert "30 100" in done

    def test_exec_with_one(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        done = _with_terminal(kata, "task", "exec", "-t", "--exec-id", "t1", container_id, "tty")
        assert "/dev/pts/" in done


class TestState:
    def test_pause_and_resume(self, kata: Kata) -> None:
        container_id = kata.start("sh", "-c", "while :; do :; done")
        kata.ctr("task", "pause", container_id)
        assert kata.status(container_id) == "PAUSED"
        again = kata.ctr("task", "pause", container_id, check=False)
        assert again.returncode != 0
        assert "paused" in again.stderr
        kata.ctr("task", "resume", container_id)
        assert kata.status(container_id) == "RUNNING"

    def test_metrics(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        text = kata.ctr("task", "metrics", container_id).stdout
        assert container_id in text
        assert "memory" in text.lower()

    def test_pids_are_never_empty_and_live_in_the_pod_s_network(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        pid = kata.ctr("task", "ps", container_id).stdout.splitlines()[1].split()[0]
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        assert int(pid) == kata.pid_of(container_id, "vmm")

    def test_a_running_container_is_not_removed(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        done = kata.ctr("task", "rm", container_id, check=False)
        assert done.returncode != 0
        assert kata.status(container_id) == "RUNNING"

    def test_what_is_not_there_is_told(self, kata: Kata) -> None:
        container_id = kata.start("sleep", "1000")
        done = kata.ctr("task", "kill", "--exec-id", "none", container_id, check=False)
        assert done.returncode != 0
        assert "none" in done.stderr
        done = kata.ctr("task", "checkpoint", container_id, check=False)
        assert done.returncode != 0
        assert "checkpoint is not supported" in done.stderr
        assert kata.status(container_id) == "RUNNING"

    def test_memory_limit_is_enforced_by_the_guest(self, kata: Kata) -> None:
        done = kata.run(
            *("sh", "-c", "dd if=/dev/zero of=/dev/null bs=300M count=1"),
            flags=("--memory-limit", str(64 << 20)),
            check=False,
        )
        assert done.returncode == 137


def test_the_events_and_their_order(kata: Kata, containerd: Containerd) -> None:
    events = EventLog(containerd)
    try:
        container_id = kata.start("sleep", "1000")
        kata.execute(container_id, "true")
        kata.ctr("task", "kill", "-s", "KILL", container_id)
        wait_until(lambda: kata.status(container_id) == "STOPPED", 10, "stopped")
        kata.ctr("task", "rm", container_id, check=False)
        expected = [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit",
            "/tasks/exit",
            "/tasks/delete",
        ]
        wait_until(lambda: len(events.topics(container_id)) >= len(expected), 5, "all events")
        assert events.topics(container_id) == expected
    finally:
        events.close()


def test_containers_side_by_side(kata: Kata) -> None:
    ids = [kata.start("sh", "-c", "echo $0 > /name; sleep 1000", str(n)) for n in range(3)]
    for number, container_id in enumerate(ids):
        assert kata.execute(container_id, "cat", "/name").stdout == f"{number}\n"


def test_only_the_rootfs_is_visible_in_the_share(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    pid = kata.pid_of(container_id, "virtiofsd")
    # virtiofsd's root is the share; names in it are what the guest can ever reach.
    names = os.listdir(f"/proc/{pid}/root")
    assert container_id in names
    assert all(name.startswith(container_id) for name in names), names


def test_sigterm_reaches_init(kata: Kata) -> None:
    script = "trap 'exit 9' TERM; touch /ready; while :; do sleep 0.1; done"
    container_id = kata.start("sh", "-c", script)
    wait_until(
        lambda: kata.execute(container_id, "test", "-e", "/ready", check=False).returncode == 0,
        10,
        "the trap is set",
    )
    kata.ctr("task", "kill", "-s", "TERM", container_id)
    wait_until(lambda: kata.status(container_id) == "STOPPED", 10, "stopped by TERM")
    assert kata.delete(container_id) == 9


def _with_terminal(kata: Kata, *args: str, resized: tuple[int, int] | None = None) -> str:
    """Run `ctr` on a pty of 24 rows and 80 columns; returns all that appeared on it.

    With `resized` it gets so many rows and columns once the size of the beginning was printed.
    """
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = kata.popen(*args, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    try:
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:
                break
            if not chunk:
                break
            output += chunk
            if resized is not None and b"24 80" in output:
                fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", *resized, 0, 0))
                process.send_signal(signal.SIGWINCH)  # again and again: `ctr` may not listen yet
        assert process.wait(30) == 0, output
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(leader)
    return output.decode(errors="replace")
