# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from vmm.errors import VmmConfigError
from vmm.kept_process import KeptProcess

SLEEP = ["/bin/sleep", "1000"]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until_gone(pid: int) -> None:
    with trio.fail_after(5):
        while is_there(pid):
            await trio.sleep(0.005)


async def test_it_has_a_status_though_it_is_no_child() -> None:
    async with trio.open_nursery() as nursery:
        process = KeptProcess(["/bin/sh", "-c", "echo last words; exit 7"], name="helper")
        process.start(nursery)
        assert await process.wait() == 7
        assert process.describe_end() == "helper exited with status 7:\nlast words"
    await until_gone(process.keeper_pid)


async def test_kill_and_cancellation_end_it_and_its_keeper() -> None:
    async with trio.open_nursery() as nursery:
        killed = KeptProcess(SLEEP, name="helper")
        killed.start(nursery)
        assert os.stat(f"/proc/{killed.pid}").st_uid == os.getuid()
        await killed.kill()
        assert killed.returncode == -signal.SIGKILL
        cancelled = KeptProcess(SLEEP, name="helper")
        cancelled.start(nursery)
        nursery.cancel_scope.cancel()
    for process in (killed, cancelled):
        assert not is_there(process.pid)
        await until_gone(process.keeper_pid)


async def test_a_program_that_is_not_there_is_named() -> None:
    before = os.listdir("/proc/self/fd")
    async with trio.open_nursery() as nursery:
        process = KeptProcess(["/nonexistent/program"], name="helper")
        with pytest.raises(VmmConfigError, match="/nonexistent/program"):
            process.start(nursery)
    assert os.listdir("/proc/self/fd") == before


async def test_the_death_of_the_keeper_is_its_death() -> None:
    async with trio.open_nursery() as nursery:
        process = KeptProcess(SLEEP, name="helper")
        process.start(nursery)
        os.kill(process.keeper_pid, signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL


async def test_it_changes_hands(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = sorted(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        script = f"read words < {fifo}; echo $words; exit 3"
        first = KeptProcess(["/bin/sh", "-c", script], name="helper")
        async with trio.open_nursery() as owner:
            first.start(owner)
            descriptors = first.let_go()
            owner.cancel_scope.cancel()
        assert is_there(first.pid)
        second = KeptProcess.adopt(
            first.pid, first.keeper_pid, descriptors, name="helper", nursery=nursery
        )
        await trio.to_thread.run_sync(fifo.write_text, "hear me\n")
        assert await second.wait() == 3
        assert second.output.text() == "hear me"
    assert not is_there(second.pid)
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_who_adopted_it_can_kill_it() -> None:
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as owner:
            first = KeptProcess(SLEEP, name="helper")
            first.start(owner)
            descriptors = first.let_go()
            owner.cancel_scope.cancel()
        second = KeptProcess.adopt(
            first.pid, first.keeper_pid, descriptors, name="helper", nursery=nursery
        )
        await second.kill()
        assert second.returncode == -signal.SIGKILL
    assert not is_there(first.pid)


_OWNER = """
import sys, trio
sys.path.insert(0, {tree!r})
from vmm.kept_process import KeptProcess

async def main():
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            process = KeptProcess(["/bin/sleep", "1000"], name="helper")
            process.start(nursery)
            print(process.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_it_goes_with_its_owner_however_that_ends() -> None:
    tree = str(Path(__file__).parents[2])
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER.format(tree=tree)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pids = [int(owner.stdout.readline()) for _ in range(2)]
    assert all(map(is_there, pids))
    owner.kill()
    owner.wait()
    for pid in pids:  # also the first: the second's keeper holds no end of the first's pipe
        await until_gone(pid)
