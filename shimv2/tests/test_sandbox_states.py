# SPDX-License-Identifier: Apache-2.0
"""containerd's Sandbox API in every state of the sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from shimv2.api import sandbox_pb2 as api
from shimv2.sandbox_service import NOT_READY, READY, SandboxService
from shimv2.tests.fakes import FakeLife, Shim, shim_of
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmError


class Pod:
    """The Sandbox service of a shim that has no config.json."""

    def __init__(self, shim: Shim) -> None:
        self.shim = shim
        self._service = SandboxService(shim.sandbox)

    async def ask(self, method: str, **fields: Any) -> Any:
        kind = "PingRequest" if method == "PingSandbox" else f"{method}Request"
        request = getattr(api, kind)(**{"sandbox_id": "pod", **fields})
        with trio.fail_after(2):
            return await getattr(self._service, method)(request, None)

    async def code(self, method: str, **fields: Any) -> Code:
        try:
            await self.ask(method, **fields)
        except RpcError as error:
            return error.code
        return Code.OK


@pytest.fixture
async def pod(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Pod]:
    async with shim_of(tmp_path, monkeypatch) as shim:
        yield Pod(shim)


async def test_before_its_create(pod: Pod) -> None:
    assert await pod.code("StartSandbox") == Code.FAILED_PRECONDITION
    assert await pod.code("WaitSandbox") == Code.FAILED_PRECONDITION
    assert await pod.code("StopSandbox") == Code.OK
    assert (await pod.ask("SandboxStatus", verbose=True)).state == NOT_READY
    assert await pod.code("SandboxMetrics") == Code.FAILED_PRECONDITION
    assert await pod.code("CreateSandbox", sandbox_id="other") == Code.NOT_FOUND


async def test_one_life(pod: Pod) -> None:
    await pod.ask("CreateSandbox")
    assert await pod.code("CreateSandbox") == Code.ALREADY_EXISTS
    await pod.ask("StartSandbox")
    await pod.ask("StartSandbox")
    assert (await pod.ask("SandboxStatus")).state == READY
    await pod.shim.ask("Shutdown", id="pod")  # a task's; the sandbox stays
    assert not pod.shim.sandbox._shutdown.is_set()
    for _ in range(2):
        await pod.ask("StopSandbox", timeout_secs=1)
        answer = await pod.ask("WaitSandbox")
        assert answer.exit_status == 0
        assert answer.exited_at.seconds
    status = await pod.ask("SandboxStatus", verbose=True)
    assert status.state == NOT_READY
    assert status.exited_at == answer.exited_at
    assert await pod.code("StartSandbox") == Code.FAILED_PRECONDITION
    assert await pod.code("CreateSandbox") == Code.ALREADY_EXISTS
    await pod.ask("ShutdownSandbox")
    assert pod.shim.sandbox._shutdown.is_set()
    assert await pod.code("CreateSandbox") == Code.FAILED_PRECONDITION


async def test_a_vm_that_does_not_start(pod: Pod) -> None:
    FakeLife.failures.append(VmmError("no memory"))
    await pod.ask("CreateSandbox")
    with pytest.raises(RpcError, match="no memory"):
        await pod.ask("StartSandbox")
    assert (await pod.ask("WaitSandbox")).exit_status == 255
    assert (await pod.ask("SandboxStatus")).state == NOT_READY
    await pod.ask("StopSandbox")
    await pod.ask("ShutdownSandbox")


async def test_a_vm_that_goes_while_it_is_asked_for_facts(pod: Pod, monkeypatch: Any) -> None:
    async def facts() -> dict[str, str]:
        raise VmmError("gone")

    await pod.ask("CreateSandbox")
    await pod.ask("StartSandbox")
    monkeypatch.setattr(pod.shim.guest, "facts", facts, raising=False)
    assert not (await pod.ask("SandboxStatus", verbose=True)).info
