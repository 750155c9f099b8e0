# SPDX-License-Identifier: Apache-2.0
"""Helpers: output, end, parent-death signal, placement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio

from vmm.errors import VmmConfigError
from vmm.hypervisor import Placement
from vmm.process import LINE_BYTES, RING_LINES, HelperProcess, OutputRing

SH = "/bin/sh"


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_ring_is_bounded_and_printable() -> None:
    seen: list[str] = []
    ring = OutputRing(seen.append)
    ring.feed(b"a\x1b[31mred\xff\r\nhalf")
    ring.feed(b" line\n" + b"x" * (1 << 20))
    ring.feed(b"tail\n")
    for number in range(100):
        ring.feed(f"{number}\n".encode())
    ring.close()
    assert seen[0] == "a�[31mred�"
    assert seen[1] == "half line"
    assert seen[2] == "x" * LINE_BYTES + "…"
    assert ring.lines() == [str(number) for number in range(100 - RING_LINES, 100)]


async def test_exit_status_output_and_many_waiters() -> None:
    process = HelperProcess([SH, "-c", "echo out; echo err >&2; printf end; exit 3"], name="helper")
    statuses = []
    async with trio.open_nursery() as nursery:
        process.start(nursery)

        async def waiter() -> None:
            statuses.append(await process.wait())

        for _ in range(3):
            nursery.start_soon(waiter)
    assert statuses == [3, 3, 3]
    assert process.describe_end() == "helper exited with status 3:\nout\nerr\nend"
    await process.kill()


async def test_kill_takes_the_whole_group() -> None:
    process = HelperProcess([SH, "-c", "sleep 1000 & echo $!; wait"], name="helper")
    async with trio.open_nursery() as nursery:
        process.start(nursery)
        with trio.fail_after(5):
            while not process.output.lines():
                await trio.sleep(0.01)
        child = int(process.output.lines()[0])
        assert os.getsid(process.pid) == process.pid
        await process.kill()
        await process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "SIGKILL" in process.describe_end()
    with trio.fail_after(5):
        while not gone(child):
            await trio.sleep(0.01)


async def test_cancelled_owner_kills_and_reaps() -> None:
    process = HelperProcess(["/bin/sleep", "1000"], name="helper")
    async with trio.open_nursery() as nursery:
        process.start(nursery)
        nursery.cancel_scope.cancel()
    assert process.returncode == -signal.SIGKILL
    assert gone(process.pid)


async def test_stdin_is_empty_and_fds_are_passed() -> None:
    read_end, write_end = os.pipe()
    process = HelperProcess(
        [SH, "-c", f"cat; echo given >/proc/self/fd/{write_end}"],
        name="helper",
        pass_fds=[write_end],
    )
    async with trio.open_nursery() as nursery:
        process.start(nursery)
    os.close(write_end)
    assert os.read(read_end, 100) == b"given\n"
    os.close(read_end)
    open_fds = os.listdir("/proc/self/fd")
    async with trio.open_nursery() as nursery:
        HelperProcess(["/bin/true"], name="helper").start(nursery)
    assert os.listdir("/proc/self/fd") == open_fds


async def test_what_cannot_be_started_is_named() -> None:
    for argv, placement, message in (
        (["/nonexistent/program"], Placement(), "/nonexistent/program"),
        (["/bin/true"], Placement(netns=Path("/nonexistent/ns")), "network namespace"),
        (["/bin/true"], Placement(cgroup_procs=(Path("/nonexistent/cg"),)), "cgroup"),
        (["/bin/true"], Placement(netns=Path("/proc/self/ns/mnt")), "setns|Invalid"),
    ):
        async with trio.open_nursery() as nursery:
            with pytest.raises(VmmConfigError, match=message):
                HelperProcess(argv, name="helper", placement=placement).start(nursery)


async def test_enters_namespace_and_cgroup(tmp_path: Path) -> None:
    holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 1000"], stdout=-1)
    assert holder.stdout is not None
    holder.stdout.readline()
    netns = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY)
    procs = tmp_path / "cgroup.procs"
    procs.touch()
    process = HelperProcess(
        [SH, "-c", "readlink /proc/self/ns/net"],
        name="helper",
        placement=Placement(netns=Path(f"/proc/self/fd/{netns}"), cgroup_procs=(procs,)),
    )
    try:
        async with trio.open_nursery() as nursery:
            process.start(nursery)
        assert process.output.lines() == [os.readlink(f"/proc/{holder.pid}/ns/net")]
        assert process.output.lines() != [os.readlink("/proc/self/ns/net")]
        assert procs.read_text() == "0"
    finally:
        os.close(netns)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_dies_with_its_parent() -> None:
    script = textwrap.dedent(
        """
        import trio
        from vmm.process import HelperProcess

        async def main():
            async with trio.open_nursery() as nursery:
                helper = HelperProcess(["/bin/sleep", "1000"], name="helper")
                helper.start(nursery)
                print(helper.pid, flush=True)

        trio.run(main)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert parent.stdout is not None
    pidfd = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()

    async def ended() -> None:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(pidfd)

    trio.run(ended)
    os.close(pidfd)


@pytest.mark.slow
async def test_idle_helper_lives_after_a_minute() -> None:
    """Worker threads of trio end after 10 s; a helper forked by one would die with it."""
    await trio.to_thread.run_sync(lambda: None)
    process = HelperProcess(["/bin/sleep", "1000"], name="helper")
    async with trio.open_nursery() as nursery:
        process.start(nursery)
        with trio.move_on_after(61):
            await process.wait()
        assert not process.ended
        await process.kill()


async def test_not_on_a_worker_thread() -> None:
    async with trio.open_nursery() as nursery:
        process = HelperProcess(["/bin/true"], name="helper")
        with pytest.raises(RuntimeError, match="main thread"):
            await trio.to_thread.run_sync(process.start, nursery)
