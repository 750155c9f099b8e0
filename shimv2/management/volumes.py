# SPDX-License-Identifier: Apache-2.0
"""Direct-assigned volumes of a running sandbox: how full they are, and growing them."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from agent.api import agent_pb2
from shimv2.container_files import direct_mount_point
from shimv2.management.guest import running
from shimv2.management.http import HttpError, Request, Response

if TYPE_CHECKING:
    from shimv2.container_files import ContainerFiles
    from shimv2.sandbox import Sandbox

_LARGEST = (1 << 63) - 1


async def stats(sandbox: Sandbox, request: Request) -> Response:
    """GET /direct-volume/stats?path=VOLUME: bytes and inodes of its file system."""
    volume = request.query.get("path", "")
    _files_of(sandbox, volume)
    reply = await (await running(sandbox)).call(
        "GetVolumeStats", agent_pb2.VolumeStatsRequest(volume_guest_path=direct_mount_point(volume))
    )
    document = {
        "usage": [
            {
                "available": usage.available,
                "total": usage.total,
                "used": usage.used,
                "unit": usage.unit,
            }
            for usage in reply.usage
        ],
        "volume_condition": {
            "abnormal": reply.volume_condition.abnormal,
            "message": reply.volume_condition.message,
        },
    }
    return Response(json.dumps(document), content_type="application/json")


async def resize(sandbox: Sandbox, request: Request) -> Response:
    """POST /direct-volume/resize {"VolumePath": …, "Size": bytes}: its disk has grown on the
    host, now its file system does."""
    try:
        document = json.loads(request.body)
        volume, size = document["VolumePath"], document["Size"]
    except (ValueError, KeyError, TypeError):
        volume, size = None, None
    if not isinstance(volume, str) or type(size) is not int or not 0 < size <= _LARGEST:
        raise HttpError(
            HTTPStatus.BAD_REQUEST, 'the body must be {"VolumePath": a text, "Size": bytes}'
        )
    files = _files_of(sandbox, volume)
    guest = await running(sandbox)
    await files.grow(volume, size)
    await guest.call(
        "ResizeVolume",
        agent_pb2.ResizeVolumeRequest(volume_guest_path=direct_mount_point(volume), size=size),
    )
    return Response()


def _files_of(sandbox: Sandbox, volume: str) -> ContainerFiles:
    """Of a container that has the volume."""
    if not volume:
        raise HttpError(HTTPStatus.BAD_REQUEST, "path: missing")
    for container in sandbox.containers.values():
        if container.files is not None and container.files.has_volume(volume):
            return container.files
    raise HttpError(
        HTTPStatus.NOT_FOUND, f"no container of sandbox {sandbox.id} has direct volume {volume}"
    )
