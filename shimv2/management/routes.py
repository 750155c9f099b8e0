# SPDX-License-Identifier: Apache-2.0
"""Which request is answered by whom, with Kata's paths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from shimv2.errors import as_rpc_error
from shimv2.management import guest, volumes
from shimv2.management.http import HttpError, Request, Response
from ttrpc.errors import Code, RpcError

if TYPE_CHECKING:
    from shimv2.sandbox import Sandbox

#: A handler may raise HttpError, or what the shim's own calls raise (`shimv2.errors`).
Handler = Callable[["Sandbox", Request], Awaitable[Response]]

ROUTES: dict[str, dict[str, Handler]] = {
    "/metrics": {"GET": guest.metrics},
    "/agent-url": {"GET": guest.agent_url},
    "/env": {"GET": guest.env},
    "/iptables": {"GET": guest.get_iptables, "PUT": guest.set_iptables},
    "/direct-volume/resize": {"POST": volumes.resize},
    "/direct-volume/stats": {"GET": volumes.stats},
    "/ip6tables": {"GET": guest.get_iptables, "PUT": guest.set_iptables},
}

_STATUS = {
    Code.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    Code.FAILED_PRECONDITION: HTTPStatus.CONFLICT,
    Code.RESOURCE_EXHAUSTED: HTTPStatus.INSUFFICIENT_STORAGE,
    Code.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}


class Router:
    """Answers the requests to one sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def answer(self, request: Request) -> Response:
        """Raises HttpError for everything that is no answer."""
        methods = ROUTES.get(request.path)
        if methods is None:
            raise HttpError(HTTPStatus.NOT_FOUND, f"there is no {request.path!r} here")
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise HttpError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"{request.path} takes {allowed}, not {request.method}",
                (("Allow", allowed),),
            )
        try:
            with as_rpc_error():
                return await handler(self._sandbox, request)
        except RpcError as error:
            status = _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
            raise HttpError(status, error.message) from error
