# SPDX-License-Identifier: Apache-2.0
"""A host's clock that is set."""

from __future__ import annotations

import os
import time

import pytest
import trio
import trio.testing

from shimv2.host_clock import HostClock


def _set_to_what_it_is() -> None:
    """For the kernel that is a change like any other; nobody else notices."""
    now = time.clock_gettime_ns(time.CLOCK_REALTIME)
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, now)
    except PermissionError:
        pytest.skip("needs CAP_SYS_TIME")


async def test_each_setting_is_noticed_once() -> None:
    with HostClock() as clock:
        for _ in range(2):
            with trio.move_on_after(0.05) as scope:
                await clock.wait_set()
            assert scope.cancelled_caught
            _set_to_what_it_is()  # nobody waits: it is found afterwards
            with trio.fail_after(5):
                await clock.wait_set()


async def test_a_waiting_task_is_woken_and_nothing_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")
    with HostClock() as clock, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clock.wait_set)
            await trio.testing.wait_all_tasks_blocked()
            _set_to_what_it_is()
    assert os.listdir("/proc/self/fd") == before
