# SPDX-License-Identifier: Apache-2.0
"""Starts of sandboxes as traces for an OpenTelemetry collector: OTLP over HTTP, as JSON.

A trace is one start, with a span for each phase.  They come from what shims have kept on the
host anyway (`shimv2.boot`), so no shim talks to a network.  Ids follow from the start itself:
whoever gets one twice has it once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import trio

from shimv2.boot.history import BootRecord
from shimv2.boot.phases import phases, total
from shimv2.management.client import FetchError, post
from shimv2.monitor.starts import BEGINNING, later_than, place_of
from shimv2.state import SandboxRecord
from shimv2.version import VERSION

log = logging.getLogger("kata-monitor")

_EVERY = 5.0  # seconds between two looks at the host's starts
_LIMIT = 10.0  # seconds for the collector
_INTERNAL, _SERVER = 1, 2  # SpanKind
# OpenTelemetry's names of what a record has of a pod.
_POD_ATTRIBUTES = {
    "name": "k8s.pod.name",
    "uid": "k8s.pod.uid",
    "namespace": "k8s.namespace.name",
}


class Collector(NamedTuple):
    """Where traces go."""

    host: str
    port: int
    target: str


def collector(url: str) -> Collector:
    """From an endpoint as OTEL_EXPORTER_OTLP_ENDPOINT has it, or the whole URL of its traces.

    Raises:
        ValueError: says what is wrong with it.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is no URL http://HOST:PORT (a collector nearby can do TLS)")
    return Collector(
        parts.hostname,
        parts.port or 4318,
        parts.path if parts.path.strip("/") else "/v1/traces",
    )


class Exporter:
    """Sends each start once; those before its own begin are not sent."""

    def __init__(self, where: Collector) -> None:
        self._where = where
        self._last = max(map(place_of, later_than(BEGINNING)), default=BEGINNING)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(_EVERY)
            await self.export()

    async def export(self) -> None:
        """What is new; a collector that does not take it gets it the next time."""
        new = later_than(self._last)
        if not new:
            return
        body = json.dumps(document(new)).encode()
        try:
            await post(*self._where, body, "application/json", limit=_LIMIT)
        except FetchError as error:
            # By OTLP's rules only these are worth another try.
            if not 400 <= error.status < 500 or error.status == HTTPStatus.TOO_MANY_REQUESTS:
                log.warning("%d traces are kept for later: %s", len(new), error)
                return
            log.error("%d traces are refused: %s", len(new), error)
        self._last = place_of(new[-1])


def document(records: list[BootRecord]) -> dict[str, Any]:
    """An ExportTraceServiceRequest (opentelemetry-proto), in its JSON form."""
    resource = {"service.name": "kata", "host.name": socket.gethostname()}
    spans = [span for record in records for span in _spans(record)]
    scope = {"scope": {"name": "pykata", "version": VERSION}, "spans": spans}
    return {
        "resourceSpans": [
            {"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}
        ]
    }


def _spans(record: BootRecord) -> list[dict[str, Any]]:
    digest = hashlib.sha256(f"{record.started} {record.id}".encode()).hexdigest()
    trace, root = digest[:32], digest[32:48]
    about = {
        "container.runtime": "kata",
        "kata.sandbox.id": record.id,
        "kata.start.kind": record.kind,
        "kata.accelerator": record.accelerator,
        "containerd.namespace": record.namespace,
    }
    sandbox = SandboxRecord.load(record.id)  # None if it is gone already
    for what, value in (sandbox.pod if sandbox else {}).items():
        about[_POD_ATTRIBUTES[what]] = value

    def span(name: str, kind: int, begin: float, end: float) -> dict[str, Any]:
        return {
            "traceId": trace,
            "spanId": root,
            "name": name,
            "kind": kind,
            "startTimeUnixNano": str(record.started + int(begin * 1e9)),
            "endTimeUnixNano": str(record.started + int(end * 1e9)),
        }

    found = [span("sandbox start", _SERVER, 0, total(record)) | {"attributes": _attributes(about)}]
    for phase in phases(record):
        own = hashlib.sha256(f"{digest} {phase.name}".encode()).hexdigest()[:16]
        attributes = _attributes({"kata.phase.side": phase.side, "kata.phase.title": phase.title})
        child = span(phase.name, _INTERNAL, phase.begin, phase.end)
        found.append(child | {"spanId": own, "parentSpanId": root, "attributes": attributes})
    return found


def _attributes(values: dict[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items() if value]
