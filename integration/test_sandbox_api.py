# SPDX-License-Identifier: Apache-2.0
"""containerd's Sandbox API, asked on the socket of the shim of a running pod."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.lib.cri import CriNode
from shimv2.api import sandbox_pb2 as api
from shimv2.version import VERSION
from ttrpc.client import Client
from ttrpc.errors import Code, RpcError

_SERVICE = api.DESCRIPTOR.services_by_name["Sandbox"]
_LIMIT = 30  # seconds


@pytest.mark.parametrize("cri_node", ["go-shim"], indirect=True)
def test_a_running_pod_s_answers(node: CriNode) -> None:
    pod = node.run_pod()
    node.start_container(pod, "sleep", "1000")
    record = json.loads(Path(f"/run/vc/sbs/{pod}/state.json").read_text())

    async def ask() -> None:
        with trio.fail_after(_LIMIT):
            async with Client(await trio.open_unix_socket(record["socket"])) as client:
                await _ask(client.stub(_SERVICE), pod, record["processes"]["vmm"][0])

    trio.run(ask)
    assert node.inspect_pod(pod)["status"]["state"] == "SANDBOX_READY"
    node.remove_pod(pod)


async def _ask(sandbox: Any, pod: str, vmm: int) -> None:
    await sandbox.PingSandbox(api.PingRequest(sandbox_id=pod))
    platform = await sandbox.Platform(api.PlatformRequest(sandbox_id=pod))
    assert platform.platform.os == "linux"
    short = await sandbox.SandboxStatus(api.SandboxStatusRequest(sandbox_id=pod))
    assert short.state == "SANDBOX_READY"
    assert Path(f"/proc/{short.pid}").exists()
    assert not short.info
    request = api.SandboxStatusRequest(sandbox_id=pod, verbose=True)
    info = dict((await sandbox.SandboxStatus(request)).info)
    assert info["runtime"] == VERSION
    assert info["agent"]
    assert info["vmm"].startswith("qemu ")
    assert int(info["pid"]) == vmm
    assert int(info["vcpus"]) == 1
    assert int(info["memory_mib"]) == 2048
    assert 50 << 20 < int(info["rss_bytes"]) < 2 << 30
    # What the sandbox's state does not allow is refused, and changes nothing.
    create = api.CreateSandboxRequest(sandbox_id=pod, bundle_path=os.path.dirname(pod) or "/")
    assert await _refused(sandbox.CreateSandbox(create)) is Code.ALREADY_EXISTS
    other = api.SandboxStatusRequest(sandbox_id="another")
    assert await _refused(sandbox.SandboxStatus(other)) is Code.NOT_FOUND
    with trio.move_on_after(0.3) as waiting:
        await sandbox.WaitSandbox(api.WaitSandboxRequest(sandbox_id=pod))
    assert waiting.cancelled_caught


async def _refused(call: Any) -> Code:
    with pytest.raises(RpcError) as caught:
        await call
    return caught.value.code
