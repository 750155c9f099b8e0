# SPDX-License-Identifier: Apache-2.0
"""Starts as traces, to a collector that is there, away, or unwilling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from shimv2 import state
from shimv2.boot import history
from shimv2.boot.history import BootRecord
from shimv2.management.http import HttpError, Request, Response, serve_connection
from shimv2.monitor.cli import main
from shimv2.monitor.traces import Collector, Exporter, collector, document

MARKS = {"imported": 0.25, "prepared": 0.5, "container-started": 2.0}


@pytest.fixture(autouse=True)
def _own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "HISTORY", tmp_path / "boot")
    monkeypatch.setattr(state, "SANDBOXES", tmp_path / "sbs")


def start(number: int) -> BootRecord:
    record = BootRecord(f"s{number}", "k8s.io", "template", number * 10**18, MARKS, "tcg")
    history.save(record, history.HISTORY)
    return record


def test_a_trace_of_a_start() -> None:
    pod = state.SandboxRecord("s1", "k8s.io", "", "")
    pod.pod = {"name": "web", "namespace": "default", "uid": "1-2"}
    (state.SANDBOXES / "s1").mkdir(parents=True)
    pod.save()
    (resource,) = document([start(1), start(2)])["resourceSpans"]
    (scope,) = resource["scopeSpans"]
    spans = scope["spans"]
    assert len({span["spanId"] for span in spans}) == len(spans) == 8
    root, *children = [s for s in spans if s["traceId"] == spans[0]["traceId"]]
    assert "parentSpanId" not in root
    assert all(child["parentSpanId"] == root["spanId"] for child in children)
    assert [child["name"] for child in children] == ["shim", "prepare", "start"]
    assert root["startTimeUnixNano"] == "1000000000000000000"
    assert root["endTimeUnixNano"] == children[-1]["endTimeUnixNano"] == "1000000002000000000"
    assert children[1]["startTimeUnixNano"] == children[0]["endTimeUnixNano"]
    attributes = {a["key"]: a["value"]["stringValue"] for a in root["attributes"]}
    assert attributes["k8s.pod.name"] == "web"
    assert attributes["k8s.namespace.name"] == "default"
    assert attributes["kata.start.kind"] == "template"
    assert len(root["traceId"]) == 32
    assert len(root["spanId"]) == 16


async def test_each_is_sent_once_and_kept_while_nobody_takes_it(nursery: Any) -> None:
    got: list[dict[str, Any]] = []
    willing = False

    async def answer(request: Request) -> Response:
        if not willing:
            raise HttpError(503, "later")
        assert (request.method, request.path) == ("POST", "/v1/traces")
        assert request.headers["content-type"] == "application/json"
        got.append(json.loads(request.body))
        return Response("{}")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(
        trio.serve_listeners, lambda stream: serve_connection(stream, answer), listeners
    )
    start(1)
    exporter = Exporter(Collector("127.0.0.1", listeners[0].socket.getsockname()[1], "/v1/traces"))
    await exporter.export()
    start(2)
    await exporter.export()
    assert not got
    willing = True
    start(3)
    for _ in range(2):
        await exporter.export()
    (sent,) = got
    spans = sent["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert len({span["traceId"] for span in spans}) == 2  # not the one of before its time


async def test_what_is_refused_is_not_sent_again(nursery: Any) -> None:
    asked = []

    async def answer(request: Request) -> Response:
        asked.append(request)
        raise HttpError(400, "no")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(
        trio.serve_listeners, lambda stream: serve_connection(stream, answer), listeners
    )
    exporter = Exporter(Collector("127.0.0.1", listeners[0].socket.getsockname()[1], "/x"))
    start(1)
    for _ in range(2):
        await exporter.export()
    assert len(asked) == 1


async def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    exporter = Exporter(Collector("127.0.0.1", 1, "/v1/traces"))
    start(1)
    await exporter.export()
    assert "1 traces are kept for later: 127.0.0.1:1" in caplog.text


def test_endpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert collector("http://otel:4318") == ("otel", 4318, "/v1/traces")
    assert collector("http://[::1]/") == ("::1", 4318, "/v1/traces")
    assert collector("http://otel:80/in/traces") == ("otel", 80, "/in/traces")
    for wrong in ("https://otel:4318", "otel:4318", "http://otel:x", "http://"):
        with pytest.raises(SystemExit):
            main(["--otlp-endpoint", wrong])
        assert "--otlp-endpoint" in capsys.readouterr().err
