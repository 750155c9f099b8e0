# SPDX-License-Identifier: Apache-2.0
"""Requests to the management socket, up to the agent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.api import agent_pb2
from shimv2.guest import Guest
from shimv2.management.http import HttpError, Request
from shimv2.management.routes import Router
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmGoneError
from vmm.hypervisor import VsockDevice


class Agent:
    """Has a firewall for each family, or a failure."""

    agent_url = "vsock://3:1024"

    def __init__(self) -> None:
        self.rules = {False: b"four", True: b"six"}
        self.failure: Exception | None = None

    async def call(self, method: str, request: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        if method == "GetIPTables":
            return agent_pb2.GetIPTablesResponse(data=self.rules[request.is_ipv6])
        assert method == "SetIPTables"
        self.rules[request.is_ipv6] = request.data
        return agent_pb2.SetIPTablesResponse(data=b"done")


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def sandbox(agent: Agent) -> Any:
    async def guest() -> Agent:
        return agent

    return SimpleNamespace(id="pod", is_running=True, guest=guest)


async def status_of(sandbox: Any, request: Request) -> tuple[int, str]:
    with pytest.raises(HttpError) as caught:
        await Router(sandbox).answer(request)
    return caught.value.status, str(caught.value)


async def test_the_firewalls_are_two(sandbox: Any, agent: Agent) -> None:
    answer = Router(sandbox).answer
    assert (await answer(Request("GET", "/iptables"))).body == b"four"
    assert (await answer(Request("GET", "/ip6tables"))).body == b"six"
    assert (await answer(Request("PUT", "/ip6tables", body=b"new"))).body == b"done"
    assert agent.rules == {False: b"four", True: b"new"}
    assert (await answer(Request("GET", "/agent-url"))).body == "vsock://3:1024"


async def test_what_is_no_request(sandbox: Any) -> None:
    assert await status_of(sandbox, Request("PUT", "/iptables")) == (
        400,
        "the body has no rules for iptables-restore",
    )
    assert (await status_of(sandbox, Request("GET", "/iptables/")))[0] == 404
    assert await status_of(sandbox, Request("DELETE", "/iptables")) == (
        405,
        "/iptables takes GET, PUT, not DELETE",
    )


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (RpcError(Code.UNIMPLEMENTED, "why"), 501),
        (RpcError(Code.INTERNAL, "why"), 500),
        (RpcError(Code.DEADLINE_EXCEEDED, "why"), 504),
        (RpcError(Code.NOT_FOUND, "why"), 404),
        (VmmGoneError("why"), 503),
    ],
)
async def test_failures(sandbox: Any, agent: Agent, failure: Exception, status: int) -> None:
    agent.failure = failure
    assert await status_of(sandbox, Request("GET", "/iptables")) == (status, "why")


async def test_without_a_guest(sandbox: Any) -> None:
    sandbox.is_running = False
    for path in ("/iptables", "/agent-url"):
        assert await status_of(sandbox, Request("GET", path)) == (503, "sandbox pod is not running")


def test_where_the_agent_is() -> None:
    def url(**device: Any) -> str:
        channel = SimpleNamespace(device=VsockDevice(id="vsock0", cid=42, **device))
        return Guest.agent_url.fget(  # type: ignore[attr-defined]
            SimpleNamespace(_id="pod", _machine=SimpleNamespace(channel=channel))
        )

    assert url(vhost_fd=5) == "vsock://42:1024"
    assert url(socket=Path("/x")) == "hvsock:///run/vc/vm/pod/hybrid.sock:1024"
