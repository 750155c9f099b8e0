# SPDX-License-Identifier: Apache-2.0
"""Listens at ``/run/vc/sbs/SID/shim-monitor.sock`` as long as the sandbox's shim runs."""

from __future__ import annotations

import logging
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from shimv2.state import management_socket

if TYPE_CHECKING:
    from shimv2.sandbox import Sandbox

log = logging.getLogger("management")

ADDRESS_FILE = "monitor_address"  # in the bundle, where Kata's tools look for it
_CONNECTIONS = 8  # at the same time; more wait in the backlog
_PEER = struct.Struct("3i")  # ucred: pid, uid, gid


async def serve(sandbox: Sandbox) -> None:
    """Answer until cancelled.  What can't be done is logged: no container depends on it."""
    path = management_socket(sandbox.id)
    try:
        with _listen(path) as listener:
            Path(sandbox.settings.bundle, ADDRESS_FILE).write_text(f"unix://{path}")
            await _accept(sandbox, listener)
    except OSError as error:
        log.warning("no management socket %s: %s", path, error)


def _listen(path: Path) -> trio.socket.SocketType:
    listener = trio.socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        old = os.umask(0o177)  # nobody else can connect in between
        try:
            listener._sock.bind(str(path))  # type: ignore[attr-defined]
        finally:
            os.umask(old)
        listener.listen(_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return listener


async def _accept(sandbox: Sandbox, listener: trio.socket.SocketType) -> None:
    free = trio.Semaphore(_CONNECTIONS)
    async with trio.open_nursery() as nursery:
        while True:
            await free.acquire()
            connection, _ = await listener.accept()
            nursery.start_soon(_serve, sandbox, connection, free)


async def _serve(
    sandbox: Sandbox, connection: trio.socket.SocketType, free: trio.Semaphore
) -> None:
    try:
        with connection:
            pid, uid, _ = _PEER.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )
            if uid not in (0, os.geteuid()):
                log.warning("process %d of user %d was refused", pid, uid)
                return
            from shimv2.management.http import serve_connection
            from shimv2.management.routes import Router

            await serve_connection(trio.SocketStream(connection), Router(sandbox).answer)
    except Exception:
        log.exception("a connection to the management socket failed")
    finally:
        free.release()
