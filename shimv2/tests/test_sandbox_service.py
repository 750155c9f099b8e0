# SPDX-License-Identifier: Apache-2.0
"""The Sandbox API's states: each request in each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shimv2.api import sandbox_pb2
from shimv2.sandbox_service import NOT_READY, READY, SandboxService
from shimv2.tests.fakes import FakeLife, Shim, shim_of
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmError


class Api:
    """Short ways to ask the Sandbox service for the one sandbox."""

    def __init__(self, shim: Shim) -> None:
        self.shim = shim
        self.service = SandboxService(shim.sandbox)

    async def ask(self, method: str, **fields: Any) -> Any:
        kind = getattr(sandbox_pb2, f"{method}Request")
        return await getattr(self.service, method)(
            kind(sandbox_id=self.shim.sandbox.id, **fields), None
        )

    async def create(self) -> None:
        await self.ask("CreateSandbox", bundle_path=str(self.shim.root / "pod"))

    async def code(self, method: str, **fields: Any) -> Code:
        try:
            await self.ask(method, **fields)
        except RpcError as error:
            return error.code
        return Code.OK

    async def state(self) -> str:
        return str((await self.ask("SandboxStatus", verbose=False)).state)


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Api]:
    async with shim_of(tmp_path, monkeypatch) as shim:
        yield Api(shim)


async def test_before_create(api: Api) -> None:
    with pytest.raises(RpcError, match="precondition"):  # clients look for the word
        await api.ask("StartSandbox")
    assert await api.code("WaitSandbox") == Code.FAILED_PRECONDITION
    assert await api.code("StopSandbox") == Code.OK
    assert await api.state() == NOT_READY


async def test_another_s_sandbox(api: Api) -> None:
    for method in ("CreateSandbox", "StartSandbox", "StopSandbox", "WaitSandbox", "SandboxStatus"):
        request = getattr(sandbox_pb2, f"{method}Request")(sandbox_id="another")
        with pytest.raises(RpcError) as caught:
            await getattr(api.service, method)(request, None)
        assert caught.value.code == Code.NOT_FOUND, method


async def test_create_start_stop(api: Api, nursery: trio.Nursery) -> None:
    await api.create()
    with pytest.raises(RpcError, match="already exists") as caught:
        await api.create()
    assert caught.value.code == Code.ALREADY_EXISTS
    assert (await api.ask("StartSandbox")).created_at.seconds
    assert await api.state() == READY
    waited: list[Any] = []

    async def wait() -> None:
        waited.append(await api.ask("WaitSandbox"))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    assert not waited
    await api.ask("StopSandbox")
    await api.ask("StopSandbox")
    await trio.testing.wait_all_tasks_blocked()
    assert waited[0].exit_status == 0
    assert (await api.ask("WaitSandbox")).exited_at == waited[0].exited_at
    status = await api.ask("SandboxStatus", verbose=True)
    assert (status.state, dict(status.info)) == (NOT_READY, {})
    assert status.exited_at == waited[0].exited_at
    assert await api.code("StartSandbox") == Code.FAILED_PRECONDITION
    assert await api.code("CreateSandbox") == Code.ALREADY_EXISTS
    assert len(FakeLife.lives) == 1


async def test_stop_before_start(api: Api) -> None:
    await api.create()
    await api.ask("StopSandbox")
    assert await api.code("StartSandbox") == Code.FAILED_PRECONDITION
    assert (await api.ask("WaitSandbox")).exit_status == 0


async def test_a_lost_guest(api: Api) -> None:
    await api.create()
    await api.ask("StartSandbox")
    api.shim.guest.declare_lost("killed")
    assert (await api.ask("WaitSandbox")).exit_status == 255
    assert await api.state() == NOT_READY


async def test_a_vm_that_does_not_start(api: Api) -> None:
    FakeLife.failures.append(VmmError("no memory"))
    await api.create()
    with pytest.raises(RpcError, match="no memory"):
        await api.ask("StartSandbox")
    assert (await api.ask("WaitSandbox")).exit_status == 255
    await api.ask("StopSandbox")


async def test_a_vm_that_started_early_is_used_or_replaced(api: Api) -> None:
    """A bundle may hold a config.json, by which the VM began before CreateSandbox."""
    sandbox = api.shim.sandbox
    sandbox.settings = type(sandbox.settings)("test", "web", str(api.shim.bundle("web")), "", "",
                                              b"", -1)  # fmt: skip
    sandbox.start_early()
    assert len(FakeLife.lives) == 1
    await api.create()
    await api.ask("StartSandbox")
    assert [life.is_running for life in FakeLife.lives][-1]
    assert sum(life.is_running for life in FakeLife.lives) == 1


async def test_its_end_is_independent_of_its_containers(api: Api) -> None:
    await api.create()
    await api.ask("StartSandbox")
    await api.shim.create("c")
    api.shim.guest.end("c")
    await api.shim.ask("Wait", id="c")
    await api.shim.ask("Delete", id="c")
    await api.shim.ask("Shutdown", id="c")
    assert await api.state() == READY
    await api.ask("ShutdownSandbox")
    await api.shim.sandbox.wait_shutdown()
    assert await api.code("CreateSandbox") == Code.FAILED_PRECONDITION
