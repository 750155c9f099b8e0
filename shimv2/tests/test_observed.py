# SPDX-License-Identifier: Apache-2.0
"""Calls counted, and named in the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from shimv2 import log as shim_log
from shimv2.metrics.durations import Durations
from shimv2.observed import Observed, snake_case

log = logging.getLogger("test")


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[int]:
    """The reading end of the bundle's `log`, which all logging of this process goes to."""
    os.mkfifo(tmp_path / "log")
    fd = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    shim_log.set_up(str(tmp_path), {"sandbox": "pod"}, debug=False)
    yield fd
    root.handlers[0].close()
    root.handlers[:] = before
    root.setLevel(level)
    os.close(fd)


class Service:
    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def Exec(self, request: object, context: object) -> None:
        log.info("in the call")
        self._nursery.start_soon(self._background)
        await trio.lowlevel.checkpoint()

    async def CloseIO(self, request: object, context: object) -> None:
        raise ValueError

    async def _background(self) -> None:
        log.info("in the background")


async def test_lines_name_what_they_are_about(fifo: int) -> None:
    async with trio.open_nursery() as nursery:
        observed = Observed(Service(nursery), Durations())
        await observed.Exec(SimpleNamespace(id="web", exec_id='a"b'), None)
        log.info("outside")
    lines = {
        line.split("msg=")[1].split('"')[1]: line
        for line in os.read(fifo, 65536).decode().splitlines()
    }
    fields = 'sandbox="pod" container="web" exec="a\\"b" source=test'
    assert lines["in the call"].endswith(fields)
    assert lines["in the background"].endswith(fields)
    assert lines["outside"].endswith('sandbox="pod" source=test')


async def test_a_call_that_fails_counts_too(nursery: trio.Nursery) -> None:
    durations = Durations()
    observed = Observed(Service(nursery), durations)
    with pytest.raises(ValueError):
        await observed.CloseIO(SimpleNamespace(id="web"), None)
    assert sum(durations.counts["close_io",]) == 1
    assert not hasattr(observed, "Create")


def test_actions_are_spelled_as_katas() -> None:
    names = ("CloseIO", "ResizePty", "Pids", "Create")
    assert [snake_case(name) for name in names] == ["close_io", "resize_pty", "pids", "create"]
