# SPDX-License-Identifier: Apache-2.0
"""A host whose clock is set: only a machine of one's own allows it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from integration.kvmlab.suite.system import command_line, kata_configuration
from integration.lib.kata import Kata, wait_until

_DAY = 86_400
_FOLLOWS_WITHIN = 20  # seconds; nested guests are slow, and once a minute is the other way


@contextmanager
def _off_by(seconds: int) -> Iterator[None]:
    _step(seconds)
    try:
        yield
    finally:
        _step(-seconds)


def _step(seconds: int) -> None:
    now = time.clock_gettime_ns(time.CLOCK_REALTIME)
    time.clock_settime_ns(time.CLOCK_REALTIME, now + seconds * 1_000_000_000)


def _behind(kata: Kata, container_id: str) -> float:
    """Seconds by which the guest's clock differs, a call's time included."""
    return abs(time.time() - float(kata.execute(container_id, "date", "+%s").stdout))


def test_a_running_guest_follows(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    assert _behind(kata, container_id) < _FOLLOWS_WITHIN
    for seconds in (_DAY, -_DAY):
        with _off_by(seconds):
            wait_until(
                lambda: _behind(kata, container_id) < _FOLLOWS_WITHIN,
                _FOLLOWS_WITHIN,
                f"the guest follows a step of {seconds} s",
            )
    kata.remove(container_id)


def test_a_clone_of_another_day(kata: Kata) -> None:
    configuration = kata_configuration("[factory]\nenable_template = true\n")
    factory = ("kata-runtime", "--config", configuration, "factory")
    flags = ("--runtime-config-path", str(configuration))
    subprocess.run([*factory, "init"], check=True, timeout=300)
    try:
        for seconds in (_DAY, -_DAY):  # the template is of yesterday, then of tomorrow
            with _off_by(seconds):
                container_id = kata.start("sleep", "1000", flags=flags)
                assert "-incoming" in command_line(kata.pid_of(container_id, "vmm"))
                assert _behind(kata, container_id) < _FOLLOWS_WITHIN
                kata.remove(container_id)
    finally:
        subprocess.run([*factory, "destroy"], check=True)
