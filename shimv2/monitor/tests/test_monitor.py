# SPDX-License-Identifier: Apache-2.0
"""`kata-monitor` over shims that answer, hang, lie, or are gone."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from shimv2 import state
from shimv2.boot import history
from shimv2.boot.history import BootRecord
from shimv2.management import http
from shimv2.management.http import HttpError, Request, Response, serve_connection
from shimv2.monitor import sandboxes as listing
from shimv2.monitor import scrape
from shimv2.monitor.cli import main
from shimv2.monitor.endpoints import Endpoints
from shimv2.monitor.scrape import Scraper

TEXT = """\
# HELP kata_shim_threads Threads.
# TYPE kata_shim_threads gauge
kata_shim_threads 3
# TYPE kata_guest_load gauge
kata_guest_load{item="load1"} 0.5
# TYPE process_open_fds gauge
process_open_fds 7
"""


class Host:
    """Sandboxes made of a directory and a task."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.root = root
        self._nursery = nursery

    async def add(
        self, sandbox_id: str, answer: Callable[[Request], Awaitable[Response]], **pod: str
    ) -> None:
        directory = self.root / sandbox_id
        directory.mkdir(parents=True)
        record = state.SandboxRecord(sandbox_id, "k8s.io", "", "")
        record.pod = pod
        record.save()
        listener = trio.socket.socket(socket.AF_UNIX)
        await listener.bind(str(directory / "shim-monitor.sock"))
        listener.listen(8)
        self._nursery.start_soon(
            trio.serve_listeners,
            lambda stream: serve_connection(stream, answer),
            [trio.SocketListener(listener)],
        )

    def add_dead(self, name: str) -> None:
        (self.root / name).mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(self.root / name / "shim-monitor.sock"))


def says(text: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if request.path == "/agent-url":
            return Response("vsock://3:1024")
        return Response(text)

    return answer


async def hangs(_: Request) -> Response:
    await trio.sleep_forever()
    raise AssertionError


async def is_ill(_: Request) -> Response:
    raise HttpError(503, "not running")


@pytest.fixture(autouse=True)
def _no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SANDBOXES", tmp_path / "sbs")
    monkeypatch.setattr(listing, "RUST_SANDBOXES", tmp_path / "kata")
    monkeypatch.setattr(history, "HISTORY", tmp_path / "boot")


@pytest.fixture
async def host(tmp_path: Path, nursery: Any) -> Host:
    return Host(tmp_path / "sbs", nursery)


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The parser gives each counter the ending `_total`."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def test_the_figures_of_all_told_apart(host: Host) -> None:
    await host.add("one", says(TEXT), name="web", namespace="default", uid="1-2")
    await host.add("two", says(TEXT))
    found = samples(str(await Scraper().page()))
    pod = {"cri_name": "web", "cri_namespace": "default", "cri_uid": "1-2"}
    assert found[key("kata_shim_threads", sandbox_id="one", **pod)] == 3
    assert found[key("kata_shim_threads", sandbox_id="two")] == 3
    assert found[key("kata_guest_load", sandbox_id="two", item="load1")] == 0.5
    assert found[key("kata_shim_process_open_fds", sandbox_id="two")] == 7
    assert found[key("kata_monitor_running_shim_count")] == 2
    assert found[key("kata_monitor_process_open_fds")] > 3


async def test_those_that_are_gone_hang_or_fail_cost_only_themselves(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrape, "SHIM_LIMIT", 0.3)
    await host.add("good", says(TEXT))
    await host.add("hanging", hangs)
    await host.add("ill", is_ill)
    host.add_dead("dead")
    scraper = Scraper()
    began = time.monotonic()
    for round_ in (1, 2):
        found = samples(str(await scraper.page()))
        assert found[key("kata_monitor_scrape_failed_count_total")] == 2 * round_
        assert found[key("kata_monitor_scrape_count_total")] == round_
    assert time.monotonic() - began < 5
    up = {dict(k[1])["sandbox_id"]: v for k, v in found.items() if k[0] == "kata_monitor_shim_up"}
    assert up == {"good": 1, "hanging": 0, "ill": 0}
    assert found[key("kata_monitor_running_shim_count")] == 3
    assert found[key("kata_shim_threads", sandbox_id="good")] == 3


async def test_what_a_shim_must_not_say(host: Host) -> None:
    await host.add("first", says('# TYPE x gauge\nx{sandbox_id="other"} 1\nx 1\nx 2\n\x00\n'))
    await host.add("second", says("# TYPE x counter\nx 1\n"))
    found = samples(str(await Scraper().page()))
    assert [k for k in found if k[0].startswith("x")] == [key("x", sandbox_id="first")]


async def test_a_hundred_sandboxes(host: Host) -> None:
    for number in range(100):
        await host.add(f"sandbox-{number}", says(TEXT))
    found = samples(str(await Scraper().page()))
    assert found[key("kata_monitor_running_shim_count")] == 100
    assert sum(name == "kata_shim_threads" for name, _ in found) == 100


async def test_starts_are_counted_once() -> None:
    scraper = Scraper()
    name = "kata_shim_boot_durations_histogram_milliseconds_count"
    for number, expected in ((1, 1), (1, 1), (2, 2)):
        record = BootRecord("one", "default", "cold", number, {"container-started": 1.5})
        history.save(record, history.HISTORY)
        found = samples(str(await scraper.page()))
        assert found[key(name, kind="cold")] == expected


async def test_one_sandbox_by_its_id(host: Host) -> None:
    await host.add("one", says(TEXT))
    host.add_dead("dead")
    answer = Endpoints().answer
    assert (await answer(Request("GET", "/metrics", {"sandbox": "one"}))).body == TEXT.encode()
    url = await answer(Request("GET", "/agent-url", {"sandbox": "one"}))
    assert url.body == b"vsock://3:1024"
    for query, status in (
        ({"sandbox": "../sbs/one"}, 404),
        ({"sandbox": "nobody"}, 404),
        ({"sandbox": "dead"}, 404),
        ({}, 400),
    ):
        with pytest.raises(HttpError) as caught:
            await answer(Request("GET", "/agent-url", query))
        assert caught.value.status == status, query


async def test_families_by_their_beginnings_and_packed(host: Host) -> None:
    await host.add("one", says(TEXT))
    request = Request(
        "GET",
        "/metrics",
        {"filter_family": "kata_guest,kata_shim_threads"},
        headers={"accept-encoding": "gzip, deflate"},
    )
    response = await Endpoints().answer(request)
    assert ("Content-Encoding", "gzip") in response.headers
    assert isinstance(response.body, bytes)
    names = {name for name, _ in samples(gzip.decompress(response.body).decode())}
    assert names == {"kata_guest_load", "kata_shim_threads"}


async def test_lists_for_people_and_programs(host: Host) -> None:
    await host.add("two", says(TEXT))
    await host.add("one", says(TEXT))
    answer = Endpoints().answer
    assert (await answer(Request("GET", "/sandboxes"))).body == "one\ntwo\n"
    html = await answer(Request("GET", "/sandboxes", headers={"accept": "text/html,*/*"}))
    assert html.content_type.startswith("text/html")
    assert "/metrics?sandbox=one" in str(html.body)
    assert "/sandboxes" in str((await answer(Request("GET", "/"))).body)
    for method, path, status in (("GET", "/debug/pprof/", 404), ("POST", "/metrics", 405)):
        with pytest.raises(HttpError) as caught:
            await answer(Request(method, path))
        assert caught.value.status == status


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("8090", "localhost:", "::1:8090", "localhost:99999", "x:y"):
        with pytest.raises(SystemExit) as caught:
            main(["--listen-address", wrong])
        assert caught.value.code == 2
        assert repr(wrong) in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["--listen-address", address]) == 1
    assert address in capsys.readouterr().err


def test_limits_fit_prometheus() -> None:
    """Its scrape_timeout is 10 s unless told otherwise."""
    assert scrape.SHIM_LIMIT < scrape.ALL_LIMIT < 10 < http._ANSWER_LIMIT
