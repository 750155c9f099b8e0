# SPDX-License-Identifier: Apache-2.0
"""What can be asked through a sandbox's socket: its figures, where its agent is, its firewall."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from agent.api import agent_pb2
from shimv2.management.http import EXPOSITION, HttpError, Request, Response
from shimv2.metrics.sandbox import page_of

if TYPE_CHECKING:
    from shimv2.guest import Guest
    from shimv2.sandbox import Sandbox


async def running(sandbox: Sandbox) -> Guest:
    """The guest that runs now; a boot under way is not waited for.

    Raises:
        HttpError: there is none.
    """
    if not sandbox.is_running:
        raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, f"sandbox {sandbox.id} is not running")
    return await sandbox.guest()


async def metrics(sandbox: Sandbox, _: Request) -> Response:
    """GET /metrics: also of a sandbox whose guest is not there, or does not answer."""
    return Response(str(await page_of(sandbox)), content_type=EXPOSITION)


async def agent_url(sandbox: Sandbox, _: Request) -> Response:
    """GET /agent-url: for programs that talk to the agent themselves."""
    return Response((await running(sandbox)).agent_url)


async def env(sandbox: Sandbox, _: Request) -> Response:
    """GET /env: VMM, and the size that the VM has now, as JSON."""
    facts = await (await running(sandbox)).facts()
    return Response(json.dumps(facts), content_type="application/json")


async def get_iptables(sandbox: Sandbox, request: Request) -> Response:
    """GET /iptables, /ip6tables: as iptables-save prints it."""
    reply = await (await running(sandbox)).call(
        "GetIPTables", agent_pb2.GetIPTablesRequest(is_ipv6=_is_ipv6(request))
    )
    return Response(bytes(reply.data))


async def set_iptables(sandbox: Sandbox, request: Request) -> Response:
    """PUT /iptables, /ip6tables: what iptables-restore reads; the answer is what it printed."""
    if not request.body:
        raise HttpError(HTTPStatus.BAD_REQUEST, "the body has no rules for iptables-restore")
    reply = await (await running(sandbox)).call(
        "SetIPTables",
        agent_pb2.SetIPTablesRequest(is_ipv6=_is_ipv6(request), data=request.body),
    )
    return Response(bytes(reply.data))


def _is_ipv6(request: Request) -> bool:
    return request.path == "/ip6tables"
