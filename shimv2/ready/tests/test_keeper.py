# SPDX-License-Identifier: Apache-2.0
"""What keeps the nursery running, with programs that stand for the nursery."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from shimv2.ready import hand_over, keeper
from shimv2.ready.nursery import UPDATED

_LIMIT = 20  # seconds, on a busy host
_STUCK = "\nos.kill(os.getpid(), signal.SIGSTOP)"


class Program:
    """Attributes: runs: a line for each, of pid and session."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
        self._file = directory / "runs"
        text = "import os, signal, sys\n"
        text += f"print(os.getpid(), os.getsid(0), file=open({str(self._file)!r}, 'a'), flush=True)"
        monkeypatch.setattr(keeper, "_PROGRAM", f"{text}\n{end}\n")
        monkeypatch.setattr(keeper, "_RETRY_AFTER", 0.01)

    @property
    def runs(self) -> list[list[int]]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [[int(word) for word in line.split()] for line in lines]

    async def run(self, times: int) -> None:
        """Until it was started so often."""
        with trio.fail_after(_LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.keep_ready_shims)
                while len(self.runs) < times:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()


async def test_another_nursery_is_told_of_once(tmp_path, monkeypatch, caplog) -> None:
    await Program(tmp_path, monkeypatch, "sys.exit(0)").run(4)
    assert [r.message for r in caplog.records] == [
        "another process keeps ready shims of this installation"
    ]


async def test_each_failure_is_told_of(tmp_path, monkeypatch, caplog) -> None:
    await Program(tmp_path, monkeypatch, "sys.exit(4)").run(4)
    assert len(caplog.records) >= 3
    assert {r.message[-8:] for r in caplog.records} == {"status 4"}


async def test_after_an_update_the_next_comes_at_once(tmp_path, monkeypatch) -> None:
    program = Program(tmp_path, monkeypatch, f"sys.exit({UPDATED})")
    monkeypatch.setattr(keeper, "_RETRY_AFTER", 1000)
    await program.run(3)


async def test_one_that_is_stopped_does_not_keep_the_cache_from_its_end(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(keeper, "_END_LIMIT", 0.1)
    program = Program(tmp_path, monkeypatch, _STUCK)
    await program.run(1)
    ((pid, _),) = program.runs
    assert not Path(f"/proc/{pid}").exists()


async def test_the_terminal_s_signals_are_not_for_it(tmp_path, monkeypatch) -> None:
    program = Program(tmp_path, monkeypatch, "sys.stdin.read()")
    await program.run(1)
    ((pid, session),) = program.runs
    assert pid == session != os.getsid(0)


async def test_a_path_too_long_is_told_of_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(hand_over, "READY_SHIMS", "/run/" + "x" * 108)
    with trio.fail_after(_LIMIT):
        await keeper.keep_ready_shims()
    assert "too long" in caplog.text
