# SPDX-License-Identifier: Apache-2.0
"""The loop, the reaper and programs, each without a guest."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from agent.loop import READ, Future, Loop, Task
from agent.reaper import Reaper
from agent.spawn import Commands, spawn
from agent.waiting import Command, Wait
from ttrpc.errors import Code, RpcError


class Errors(list[BaseException]):
    def __call__(self, error: BaseException) -> None:
        self.append(error)


@pytest.fixture
def loop() -> Iterator[Loop]:
    errors = Errors()
    yield Loop(errors)
    assert not errors


@pytest.fixture
def reaper(loop: Loop) -> Iterator[Reaper]:
    before = signal.getsignal(signal.SIGCHLD)
    yield Reaper(loop)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, before)


def turn_until(loop: Loop, done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    loop.after(seconds, lambda: None)
    while not done():
        assert time.monotonic() < deadline
        loop.turn()


def finish(loop: Loop, task: Task) -> Any:
    turn_until(loop, lambda: task.future.done)
    if task.future.error is not None:
        raise task.future.error
    return task.future.value


def test_timers_in_their_order_and_cancelled_ones_never(loop: Loop) -> None:
    called: list[int] = []
    loop.after(0.02, lambda: called.append(2))
    loop.after(0.01, lambda: called.append(1))
    loop.after(0.015, lambda: called.append(9)).cancel()
    turn_until(loop, lambda: len(called) == 2)
    assert called == [1, 2]


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    for _ in range(10_000):
        loop.after(3600, lambda: None).cancel()
    assert len(loop._timers) < 1000


def test_a_generator_waits_for_a_future_a_condition_and_an_error(loop: Loop) -> None:
    future = Future()
    facts: list[str] = []

    def work() -> Generator[Any, Any, str]:
        first = yield future
        yield Wait("a fact", lambda: bool(facts), 20.0)
        try:
            yield Wait("nothing", lambda: False, 0.01, 0.005)
        except RpcError as error:
            assert error.code == Code.DEADLINE_EXCEEDED
        return first + facts[0]

    task = loop.spawn(work())
    loop.after(0.01, lambda: future.set("a"))
    loop.after(0.02, lambda: facts.append("b"))
    assert finish(loop, task) == "ab"


def test_a_hint_rechecks_at_once(loop: Loop) -> None:
    facts: list[str] = []

    def work() -> Generator[Any, Any, None]:
        yield Wait("a fact", lambda: bool(facts), 3600.0, 3600.0)

    task = loop.spawn(work())
    facts.append("now")
    loop.recheck()
    assert task.future.done


def test_a_cancelled_task_cleans_up_and_is_left_alone(loop: Loop) -> None:
    cleaned: list[str] = []
    future = Future()

    def on_future() -> Generator[Any, Any, None]:
        try:
            yield future
        finally:
            cleaned.append("future")

    def on_wait() -> Generator[Any, Any, None]:
        try:
            yield Wait("never", lambda: False, 3600.0)
        finally:
            cleaned.append("wait")

    tasks = [loop.spawn(on_future()), loop.spawn(on_wait())]
    for task in tasks:
        task.cancel()
    future.set("too late")
    loop.recheck()
    assert cleaned == ["future", "wait"]
    assert not any(task.future.done for task in tasks)


def test_an_exception_in_a_callback_ends_nothing() -> None:
    errors = Errors()
    loop = Loop(errors)
    read_end, write_end = os.pipe()
    seen: list[bytes] = []

    def fail(_events: int) -> None:
        seen.append(os.read(read_end, 1))
        raise ValueError("no")

    loop.watch(read_end, READ, fail)
    os.write(write_end, b"ab")
    turn_until(loop, lambda: len(seen) == 2)
    assert [str(error) for error in errors] == ["no", "no"]
    os.close(read_end)
    os.close(write_end)


def test_statuses(loop: Loop, reaper: Reaper) -> None:
    for script, status in (("exit 7", 7), ("kill -9 $$", 137)):
        future = reaper.status_of(spawn(["/bin/sh", "-c", script]))
        turn_until(loop, lambda future=future: future.done)  # type: ignore[misc]
        assert future.value == status


def test_a_status_from_before_the_claim(loop: Loop, reaper: Reaper) -> None:
    mark = reaper.mark()
    pid = spawn(["/bin/sh", "-c", "exit 3"])
    turn_until(loop, lambda: pid in reaper._unclaimed)
    future = reaper.status_of(pid, mark)
    assert future.done
    assert future.value == 3


def test_the_status_of_an_earlier_process_with_that_pid(loop: Loop, reaper: Reaper) -> None:
    pid = spawn(["/bin/true"])
    turn_until(loop, lambda: pid in reaper._unclaimed)
    assert not reaper.status_of(pid, reaper.mark()).done
    assert not reaper.status_of(pid).done


def test_unclaimed_statuses_are_bounded(reaper: Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = iter(range(1, 6001))
    monkeypatch.setattr(os, "waitpid", lambda *_: (next(pids, 0), 0))
    reaper.collect()
    assert len(reaper._unclaimed) == 4096
    assert 6000 in reaper._unclaimed


def test_a_command_and_its_output(loop: Loop, reaper: Reaper) -> None:
    Commands(loop, reaper)
    text = b"x" * 300_000

    def work() -> Generator[Any, Any, Any]:
        return (yield Command(["/bin/sh", "-c", "cat; echo bad >&2; exit 5"], stdin=text))

    before = len(os.listdir("/proc/self/fd"))
    done = finish(loop, loop.spawn(work()))
    assert (done.status, done.stdout, done.stderr) == (5, text, b"bad\n")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_command_that_is_not_there(loop: Loop, reaper: Reaper) -> None:
    Commands(loop, reaper)

    def work() -> Generator[Any, Any, Any]:
        return (yield Command(["/no/such/program"]))

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        finish(loop, loop.spawn(work()))
    assert len(os.listdir("/proc/self/fd")) == before
