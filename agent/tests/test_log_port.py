# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import log, log_port
from agent.log_port import LogPort
from agent.loop import Loop

Dial = Callable[[], socket.socket]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> LogPort:
    """What is logged goes here; nobody listens yet."""
    port = LogPort()
    monkeypatch.setattr(log, "port", port)
    return port


@pytest.fixture
def loop() -> Iterator[Loop]:
    problems: list[BaseException] = []
    loop = Loop(problems.append)
    yield loop
    loop._poll.close()
    assert not problems


@pytest.fixture
def dial(port: LogPort, loop: Loop, tmp_path: Path) -> Iterator[Dial]:
    """Connects to the port, a unix socket here; each `_turn` lets the agent work."""
    path = str(tmp_path / "log")
    clients: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(path)
        listener.listen()

        def connect() -> socket.socket:
            client = socket.socket(socket.AF_UNIX)
            clients.append(client)
            client.settimeout(10)
            client.connect(path)
            return client

        port.listen(listener, loop)
        yield connect
        for client in clients:
            client.close()
        for _ in clients:
            _turn(loop)
            _turn(loop)
    assert port._client == -1


def _turn(loop: Loop) -> None:
    loop.after(0, lambda: None)  # comes back even if nothing happens
    loop.turn()


def _lines(client: socket.socket, count: int) -> list[dict[str, Any]]:
    with client.makefile("rb", buffering=0) as file:
        return [json.loads(file.readline()) for _ in range(count)]


def test_what_came_before_and_what_follows(port: LogPort, loop: Loop, dial: Dial) -> None:
    log.warning('it said "no"\nétrange', field="x=1")
    log.debug("below the level")
    client = dial()
    _turn(loop)
    (line,) = _lines(client, 1)
    assert (line["msg"], line["level"], line["field"]) == ('it said "no"\nétrange', "WARN", "x=1")
    assert line["source"] == "agent"
    assert line["ts"].startswith("20")
    log.info("later")
    log.error("last")
    assert [line["level"] for line in _lines(client, 2)] == ["INFO", "ERRO"]


def test_one_client_at_a_time(port: LogPort, loop: Loop, dial: Dial) -> None:
    first, second = dial(), dial()
    _turn(loop)
    log.info("for the first")
    assert _lines(first, 1)[0]["msg"] == "for the first"
    first.close()
    _turn(loop)
    log.info("for the second")
    _turn(loop)
    assert _lines(second, 1)[0]["msg"] == "for the second"


def test_nobody_fetches_it(port: LogPort, loop: Loop, dial: Dial) -> None:
    """What waits is bounded; what is lost is told."""
    size = len(log_port._line("info", "x" * 1000, {}))
    kept = log_port._KEPT // size
    for _ in range(kept + 7):
        log.info("x" * 1000)
    client = dial()
    _turn(loop)
    received = b""
    while not received.endswith(b"}\n") or b"dropped" not in received:
        received += client.recv(1 << 20)
        _turn(loop)
    *whole, lost = [json.loads(line) for line in received.splitlines()]
    assert len(whole) == kept
    assert {line["msg"] for line in whole} == {"x" * 1000}
    assert (lost["level"], lost["count"]) == ("WARN", "7")


def test_a_client_that_leaves_in_the_middle_of_a_line(
    port: LogPort, loop: Loop, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_port, "_CHUNK", 700)  # the socket is full within a line
    for number in range(200):
        log.info("x" * 1000, number=number)
    client = dial()
    _turn(loop)
    assert port._inside, "the socket took whole lines only: nothing is tested"
    client.close()
    _turn(loop)
    following = dial()
    _turn(loop)
    first = _lines(following, 1)[0]
    assert int(first["number"]) > 0
