# SPDX-License-Identifier: Apache-2.0
"""VMs that change hands over a unix socket: one request, one answer, its descriptors.

The socket keeps message boundaries (SOCK_SEQPACKET).  Both are JSON objects::

    {"protocol": 1, "action": "take", "key": FINGERPRINT, "id": SANDBOX}
    {"protocol": 1, "facts": {…}, "pids": […]}    and the descriptors of a `Handover`
    {"protocol": 1, "action": "status"}
    {"protocol": 1, "pid": …, "machines": [{…}]}
    {"protocol": 1, "error": "…"}
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

import trio

from vmm.errors import VmmError
from vmm.hypervisor import Handover

PROTOCOL = 1
LIMIT = 60_000  # bytes of one message
_MAX_FDS = 16


class HandoverError(VmmError):
    """The other side refused, is of another version, or is gone."""


async def send(
    sock: trio.socket.SocketType, message: Mapping[str, Any], descriptors: tuple[int, ...] = ()
) -> None:
    """Send one message.

    Raises:
        HandoverError: the peer is gone.
    """
    data = json.dumps({"protocol": PROTOCOL, **message}).encode()
    rights = array.array("i", descriptors).tobytes()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
    try:
        await sock.sendmsg([data], ancillary)
    except OSError as error:
        raise HandoverError(f"the peer is gone: {error.strerror}") from error


async def receive(sock: trio.socket.SocketType) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The next message and its descriptors, which are the caller's to close.

    Raises:
        HandoverError: the peer is gone, or what it sent is no message of this protocol.
    """
    try:
        data, ancillary, flags, _ = await sock.recvmsg(
            LIMIT, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
        )
    except OSError as error:
        raise HandoverError(f"the peer is gone: {error.strerror}") from error
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    try:
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise HandoverError("the peer sent more than fits")
        if not data:
            raise HandoverError("the peer closed the connection")
        return _message(data), tuple(descriptors)
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise


def _message(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HandoverError(f"the peer sent no JSON: {error}") from error
    if not isinstance(message, dict) or message.get("protocol") != PROTOCOL:
        raise HandoverError(f"the peer does not speak version {PROTOCOL} of the protocol")
    if "error" in message:
        raise HandoverError(str(message["error"])[:500])
    return message


async def take(path: str, key: str, sandbox_id: str) -> Handover:
    """Ask the cache at `path` for a VM that fits `key`; its state directory is moved to the
    place of sandbox `sandbox_id`.

    Raises:
        HandoverError: there is no cache, or none of its VMs fits.
    """
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        await _connect(sock, path)
        await send(sock, {"action": "take", "key": key, "id": sandbox_id})
        message, descriptors = await receive(sock)
    try:
        return Handover(message["facts"], descriptors, tuple(map(int, message["pids"])))
    except (KeyError, TypeError, ValueError) as error:
        for fd in descriptors:
            os.close(fd)
        raise HandoverError(f"the cache's answer lacks {error}") from error


async def status(path: str) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        HandoverError: there is none.
    """
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        await _connect(sock, path)
        await send(sock, {"action": "status"})
        message, descriptors = await receive(sock)
    for fd in descriptors:
        os.close(fd)
    return message


async def _connect(sock: trio.socket.SocketType, path: str) -> None:
    try:
        await sock.connect(path)
    except OSError as error:
        raise HandoverError(f"no VM cache at {path}: {error.strerror}") from error
