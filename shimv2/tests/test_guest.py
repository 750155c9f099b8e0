# SPDX-License-Identifier: Apache-2.0
"""What comes out of the guest, and what is left when it goes in the middle of a request."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from agent.api import agent_pb2
from shimv2.config import load_config
from shimv2.guest import Guest
from shimv2.timeline import Timeline
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmGoneError
from vmm.hypervisor import Placement
from vmm.vsock import VsockRefused


class Connection:
    def __init__(self) -> None:
        self.closed = False

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.closed = True


class Channel:
    """Gives one connection; what comes after it is `then`."""

    def __init__(self, then: Exception | None) -> None:
        self.then = then
        self.given: list[Connection] = []

    def mark_gone(self, reason: str) -> None: ...

    async def connect(self, port: int) -> Connection:
        await trio.lowlevel.checkpoint()
        if self.given:
            if self.then is None:
                await trio.sleep_forever()
            raise self.then  # type: ignore[misc]
        self.given.append(Connection())
        return self.given[0]


class Client:
    """Every call fails with `error`."""

    def __init__(self, error: RpcError) -> None:
        self.error = error

    def stub(self, service: object) -> Any:
        async def fail(request: object, timeout: float | None = None) -> None:
            await trio.lowlevel.checkpoint()
            raise self.error

        return SimpleNamespace(Check=fail, Version=fail, SignalProcess=fail)


@pytest.fixture
def guest(tmp_path: Any) -> Any:
    (tmp_path / "c.toml").write_text("[hypervisor.qemu]\n")
    config = load_config(tmp_path / "c.toml")
    placement = Placement()
    return Guest(
        config, "web", placement=placement, timeline=Timeline(), on_process=lambda name, pid: None
    )


async def streams_of(guest: Any, channel: Channel) -> Any:
    guest._machine = SimpleNamespace(channel=channel)
    return await guest.open_streams("web", "", stdin=True, stderr=True)


async def test_a_vm_that_goes_while_streams_are_made(guest: Any) -> None:
    channel = Channel(VmmGoneError("killed"))
    with pytest.raises(VmmGoneError):  # and not a group of several
        await streams_of(guest, channel)
    assert channel.given[0].closed


async def test_a_request_given_up_while_streams_are_made(guest: Any) -> None:
    channel = Channel(None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(streams_of, guest, channel)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert channel.given[0].closed


async def test_streams_that_are_refused_go_by_rpc(guest: Any) -> None:
    channel = Channel(VsockRefused("no"))
    streams = await streams_of(guest, channel)
    assert channel.given[0].closed
    assert streams.stdout.port == 0


async def test_an_error_of_the_guest_is_bounded_and_printable(guest: Any) -> None:
    guest._client = Client(RpcError(Code.INTERNAL, "no\n\x1b[2J" + "x" * 1_000_000))
    with pytest.raises(RpcError) as caught:
        await guest.call("SignalProcess", agent_pb2.SignalProcessRequest())
    assert caught.value.code == Code.INTERNAL
    assert caught.value.message.startswith("no  [2Jxxx")
    assert len(caught.value.message) < 5000


async def test_health(guest: Any) -> None:
    guest._client = Client(RpcError(Code.DEADLINE_EXCEEDED, "late"))
    assert not await guest.is_healthy(1.0)
    assert await guest._agent_version() == ""


async def test_nothing_is_asked_of_a_lost_guest(guest: Any) -> None:
    guest._machine = SimpleNamespace(mark_gone=lambda reason: None)
    guest.declare_lost("killed")
    guest.declare_lost("later")
    with pytest.raises(RpcError, match="killed") as caught:
        await guest.call("SignalProcess", agent_pb2.SignalProcessRequest())
    assert caught.value.code == Code.UNAVAILABLE


async def test_the_guest_s_clock_is_set_each_minute(
    guest: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Also after one time that failed."""
    told: list[tuple[float, float]] = []

    async def call(method: str, request: Any) -> None:
        assert method == "SetGuestDateTime"
        told.append((trio.current_time(), request.Sec + request.Usec / 1e6 - time.time()))
        if len(told) == 1:
            raise RpcError(Code.DEADLINE_EXCEEDED, "late")

    monkeypatch.setattr(guest, "call", call)
    started = trio.current_time()
    with trio.move_on_after(190):
        await guest._keep_time()
    assert [round(at - started) for at, _ in told] == [60, 120, 180]
    assert all(-1 < error <= 0 for _, error in told)
