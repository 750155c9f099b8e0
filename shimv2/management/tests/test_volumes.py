# SPDX-License-Identifier: Apache-2.0
"""Requests about direct volumes, to a sandbox without a VM."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from agent.api import csi_pb2
from shimv2.drives import DriveError
from shimv2.management.http import HttpError, Request, Response
from shimv2.management.routes import Router

VOLUME = "/volumes/data"
POINT = "/run/kata-containers/sandbox/storage/L3ZvbHVtZXMvZGF0YQ=="


class Files:
    """Of a container with one direct volume of 100 bytes."""

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def has_volume(self, source: str) -> bool:
        return source == VOLUME

    async def grow(self, source: str, size: int) -> None:
        if size > 100:
            raise DriveError(f"disk /dev/sdf has 100 bytes, {size} are wanted")
        self._calls.append(("grow", source, size))


class Sandbox:
    """Attributes: calls: what reached the guest and its disks."""

    id = "pod"
    is_running = True

    def __init__(self) -> None:
        self.calls: list[Any] = []
        empty, full = SimpleNamespace(files=None), SimpleNamespace(files=Files(self.calls))
        self.containers = {"a": empty, "b": full}

    async def guest(self) -> Sandbox:
        return self

    async def call(self, method: str, request: Any) -> Any:
        self.calls.append((method, request.volume_guest_path))
        reply = csi_pb2.VolumeStatsResponse()
        reply.usage.add(available=1, total=3, used=2, unit=csi_pb2.VolumeUsage.BYTES)
        return reply


async def ask(sandbox: Sandbox, method: str, path: str, **more: Any) -> Response:
    return await Router(sandbox).answer(Request(method, path, **more))  # type: ignore[arg-type]


async def status(sandbox: Sandbox, method: str, path: str, **more: Any) -> int:
    with pytest.raises(HttpError) as caught:
        await ask(sandbox, method, path, **more)
    return caught.value.status


async def test_figures_in_katas_form() -> None:
    sandbox = Sandbox()
    answer = await ask(sandbox, "GET", "/direct-volume/stats", query={"path": VOLUME})
    assert json.loads(answer.body) == {
        "usage": [{"available": 1, "total": 3, "used": 2, "unit": 1}],
        "volume_condition": {"abnormal": False, "message": ""},
    }
    assert sandbox.calls == [("GetVolumeStats", POINT)]


async def test_the_disk_grows_before_its_file_system() -> None:
    sandbox = Sandbox()
    body = json.dumps({"VolumePath": VOLUME, "Size": 100}).encode()
    assert (await ask(sandbox, "POST", "/direct-volume/resize", body=body)).body == b""
    assert sandbox.calls == [("grow", VOLUME, 100), ("ResizeVolume", POINT)]


async def test_what_makes_no_sense() -> None:
    sandbox = Sandbox()
    assert await status(sandbox, "GET", "/direct-volume/stats") == 400
    assert await status(sandbox, "GET", "/direct-volume/stats", query={"path": "/other"}) == 404
    for body in (b"", b"[]", b"{}", b'{"VolumePath": "/v", "Size": true}'):
        assert await status(sandbox, "POST", "/direct-volume/resize", body=body) == 400
    for size in (0, -1, 1 << 63):
        text = json.dumps({"VolumePath": VOLUME, "Size": size}).encode()
        assert await status(sandbox, "POST", "/direct-volume/resize", body=text) == 400
    larger = json.dumps({"VolumePath": VOLUME, "Size": 101}).encode()
    assert await status(sandbox, "POST", "/direct-volume/resize", body=larger) == 409
    assert sandbox.calls == []
