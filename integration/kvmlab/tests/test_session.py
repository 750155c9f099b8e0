# SPDX-License-Identifier: Apache-2.0
"""What a run does with suites and with machines that are lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from integration.kvmlab import __main__ as command
from integration.kvmlab.machine import LabError


class Runs(command.Session):
    """Without machines: each run takes the next of `outcomes`, a status or a lost machine."""

    def __init__(self, outcomes: list[int | None], *tests: str) -> None:
        options = argparse.Namespace(action="run", tests=list(tests), limit=1.0)
        nothing: Any = None
        super().__init__(nothing, Path(), Path("results"), options, nothing)
        self.outcomes = outcomes
        self.calls: list[tuple[str, list[str]]] = []

    def _test_once(self, results: Path, words: list[str]) -> int:
        self.calls.append((results.name, words))
        outcome = self.outcomes.pop(0)
        if outcome is None:
            raise LabError("it has ended")
        return outcome


def test_each_suite_has_its_own_machine_and_one_failure_is_the_whole_s() -> None:
    runs = Runs([0, 1, 0], "smoke", "pods", "faults")
    assert runs.test() == 1
    assert [name for name, _ in runs.calls] == ["smoke", "pods", "faults"]


def test_a_lost_machine_is_no_failure() -> None:
    runs = Runs([None, 0], "pods")
    assert runs.test() == 0
    assert [name for name, _ in runs.calls] == ["pods", "pods-2"]


def test_machines_that_are_always_lost_are_an_error() -> None:
    runs = Runs([None] * command.ATTEMPTS, "pods")
    with pytest.raises(LabError):
        runs.test()


def test_a_failure_is_not_tried_again() -> None:
    runs = Runs([2], "pods")
    assert runs.test() == 2


def test_other_words_are_pytest_s() -> None:
    runs = Runs([0], "pods", "-k", "tty")
    runs.test()
    assert runs.calls == [("tests", ["integration/kvmlab/suite/pods.py", "-k", "tty"])]


def test_every_suite_is_there() -> None:
    root = Path(command.__file__).parents[2]
    for words in command.SUITES.values():
        assert (root / words[0]).is_file()
