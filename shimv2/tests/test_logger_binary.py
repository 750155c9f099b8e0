# SPDX-License-Identifier: Apache-2.0
"""Loggers of `binary://`, as real programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from shimv2.stdio import StdioError
from shimv2.tests.stdio_ends import guest_stream, make, send

pytestmark = pytest.mark.usefixtures("nothing_left_open")

LOGGER = """
import os, signal, sys
mode, target = sys.argv[2], sys.argv[4]
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "term":
    signal.signal(signal.SIGTERM, lambda *_: (open(target, "a").write("term"), sys.exit()))
if mode == "crash":
    sys.exit(3)
with open(target, "w") as log:
    log.write(repr((sys.argv[1:], os.environ["CONTAINER_ID"], os.environ["CONTAINER_NAMESPACE"],
                    sorted(map(int, os.listdir("/proc/self/fd")))[:6])) + "\\n")
    log.flush()
    if mode == "byte":
        os.write(5, b"1")
    os.close(5)
    if mode in ("stubborn", "term"):
        signal.pause(); signal.pause()
    for fd in (3, 4):
        while data := os.read(fd, 65536):
            log.write(f"{fd}:{data.decode()}\\n")
"""


@pytest.fixture
def logger(tmp_path: Path) -> Callable[..., str]:
    program = tmp_path / "logger"
    program.write_text(f"#!{sys.executable} -IS\n{LOGGER}")
    program.chmod(0o755)

    def uri(mode: str, scheme: str = "binary") -> str:
        return f"{scheme}://{program}?mode={mode}&target={tmp_path}/log"

    return uri


@pytest.mark.parametrize(("scheme", "mode"), [("binary", "close"), ("binary-v2", "byte")])
async def test_a_logger_gets_all_and_is_gone(tmp_path: Path, logger, scheme, mode) -> None:
    uri = logger(mode, scheme)
    (guest_out, out), (guest_err, err) = guest_stream(), guest_stream()
    with trio.fail_after(20):
        async with make(stdout=uri, stderr=uri) as stdio:
            await stdio.open()
            assert stdio._logger is not None
            pid = stdio._logger._process.pid
            stdio.start(None, out, err)
            guest_out.send(b"hello")
            guest_err.send(b"oh")
            await stdio.drained(timeout=4)
    guest_out.close()
    guest_err.close()
    head, *lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["3:hello", "4:oh"]
    assert f"['mode', '{mode}', 'target', '{tmp_path}/log'], 'web', 'default'" in head
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_logger_that_does_not_see_the_end_gets_sigterm(tmp_path: Path, logger, monkeypatch):
    monkeypatch.setattr("shimv2.logger_binary._FLUSH_LIMIT", 0.2)
    with trio.fail_after(20):
        async with make(stdout=logger("term")) as stdio:
            await stdio.open()
    assert (tmp_path / "log").read_text().endswith("term")


async def test_a_stubborn_logger_is_killed(logger, monkeypatch, caplog) -> None:
    monkeypatch.setattr("shimv2.logger_binary._FLUSH_LIMIT", 0.1)
    monkeypatch.setattr("shimv2.logger_binary._TERM_LIMIT", 0.2)
    with trio.fail_after(20):
        async with make(stdout=logger("stubborn")) as stdio:
            await stdio.open()
    assert "did not end" in caplog.text


async def test_loggers_that_fail(logger, tmp_path: Path) -> None:
    async with make(stdout=logger("crash", "binary-v2")) as stdio:
        with pytest.raises(StdioError, match="before it was ready"):
            await stdio.open()
    async with make(stdout="binary:///no/such/logger?a=b") as stdio:
        with pytest.raises(StdioError, match="/no/such/logger"):
            await stdio.open()


async def test_a_logger_that_dies_does_not_stop_the_process(logger, caplog) -> None:
    guest, reader = guest_stream()
    async with make(stdout=logger("close")) as stdio:
        await stdio.open()
        assert stdio._logger is not None
        stdio._logger._process.kill()
        await stdio._logger._process.wait()
        stdio.start(None, reader, None)
        with trio.fail_after(10):
            await send(guest, bytes(4 << 20))
    guest.close()
    assert "is lost" in caplog.text
