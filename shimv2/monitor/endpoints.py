# SPDX-License-Identifier: Apache-2.0
"""What ``kata-monitor`` answers, with the paths of Kata's."""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable
from html import escape
from http import HTTPStatus
from urllib.parse import quote

import trio

from shimv2.management.client import FetchError, fetch
from shimv2.management.http import EXPOSITION, HttpError, Request, Response
from shimv2.metrics.exposition import Page
from shimv2.monitor.sandboxes import Sandbox, sandboxes
from shimv2.monitor.scrape import SHIM_LIMIT, Scraper

HTML = "text/html; charset=utf-8"

_INDEX = (
    ("/metrics", "figures of all sandboxes"),
    ("/metrics?sandbox=ID", "those of one, as its shim tells them"),
    ("/metrics?filter_family=kata_shim,kata_guest", "families whose names begin so"),
    ("/sandboxes", "the ids of all sandboxes"),
    ("/agent-url?sandbox=ID", "where a sandbox's agent is reached"),
)


class Endpoints:
    """Answers requests."""

    def __init__(self) -> None:
        self._scraper = Scraper()
        self._paths: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._index,
            "/metrics": self._metrics,
            "/sandboxes": self._sandboxes,
            "/agent-url": self._agent_url,
        }

    async def answer(self, request: Request) -> Response:
        """Raises HttpError for everything that is no answer."""
        handler = self._paths.get(request.path)
        if handler is None:
            raise HttpError(HTTPStatus.NOT_FOUND, f"there is no {request.path!r} here; / lists all")
        if request.method not in ("GET", "HEAD"):
            raise HttpError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"{request.path} takes GET, not {request.method}",
                (("Allow", "GET, HEAD"),),
            )
        return await handler(request)

    async def _index(self, _: Request) -> Response:
        rows = "".join(
            f'<li><a href="{escape(path)}">{escape(path)}</a>: {escape(what)}</li>'
            for path, what in _INDEX
        )
        return Response(f"<!DOCTYPE html><title>kata-monitor</title><ul>{rows}</ul>\n", 200, HTML)

    async def _metrics(self, request: Request) -> Response:
        if "sandbox" in request.query:
            body = await _forward(request, "/metrics")
        else:
            page = await self._scraper.page()
            prefixes = tuple(filter(None, request.query.get("filter_family", "").split(",")))
            body = await trio.to_thread.run_sync(_rendered, page, prefixes)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(body, content_type=EXPOSITION)
        packed = await trio.to_thread.run_sync(gzip.compress, body, 3)
        return Response(packed, content_type=EXPOSITION, headers=(("Content-Encoding", "gzip"),))

    async def _sandboxes(self, request: Request) -> Response:
        names = [sandbox.id for sandbox in sandboxes()]
        if "text/html" not in request.headers.get("accept", ""):
            return Response("".join(f"{name}\n" for name in names))
        rows = "".join(
            f'<li>{escape(name)}: <a href="/metrics?sandbox={quote(name)}">metrics</a>, '
            f'<a href="/agent-url?sandbox={quote(name)}">agent-url</a></li>'
            for name in names
        )
        return Response(f"<!DOCTYPE html><title>sandboxes</title><ul>{rows}</ul>\n", 200, HTML)

    async def _agent_url(self, request: Request) -> Response:
        return Response(await _forward(request, "/agent-url"))


def _rendered(page: Page, prefixes: tuple[str, ...]) -> bytes:
    if prefixes:
        for name in [name for name in page.families if not name.startswith(prefixes)]:
            del page.families[name]
    return str(page).encode()


async def _forward(request: Request, target: str) -> bytes:
    sandbox = _wanted(request)
    try:
        return await fetch(sandbox.socket, target, limit=SHIM_LIMIT)
    except FetchError as error:
        status = HTTPStatus.NOT_FOUND if error.gone else error.status or HTTPStatus.BAD_GATEWAY
        raise HttpError(status, f"sandbox {sandbox.id}: {error}") from error


def _wanted(request: Request) -> Sandbox:
    """The sandbox that the query names; a path is made from none that is not listed."""
    wanted = request.query.get("sandbox", "")
    if not wanted:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"{request.path} needs ?sandbox=ID")
    for sandbox in sandboxes():
        if sandbox.id == wanted:
            return sandbox
    raise HttpError(HTTPStatus.NOT_FOUND, f"there is no sandbox {wanted!r} on this host")
