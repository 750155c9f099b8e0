# SPDX-License-Identifier: Apache-2.0
"""Port forwarding: who dials loopback in the pod's namespace on the host reaches the guest's.

containerd's port-forward dials ``localhost:PORT`` in that namespace, where nothing of the
workload listens.  All such connections are accepted here and carried over vsock to the agent,
which dials 127.0.0.1, then ::1, in the guest.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence

import trio

from shimv2.namespaces import call_inside
from shimv2.network.loopback_redirect import RedirectError, loopback_redirected
from vmm.errors import VmmError
from vmm.vsock import VsockConnection

log = logging.getLogger("network")

_AT_ONCE = 256  # connections; more wait in the listener's queue
_CHUNK = 256 << 10
_PAUSE = 0.01  # seconds after a failed accept
_ANSWER_LIMIT = 15.0  # seconds; the agent gives up after 10

Connect = Callable[[], Awaitable[VsockConnection]]


async def forward_ports(namespace: int, connect: Connect) -> None:
    """Serve until cancelled; where the kernel can't redirect, say so once and return.

    Args:
        namespace: descriptor of the pod's network namespace.
        connect: opens a connection to the agent's forward port.
    """
    with contextlib.ExitStack() as stack:
        try:
            listeners = await trio.to_thread.run_sync(call_inside, namespace, _listen)
            for listener in listeners:
                stack.callback(listener.close)
            ipv4, ipv6 = (*listeners, None)[:2]
            assert ipv4 is not None
            stack.enter_context(loopback_redirected(namespace, ipv4, ipv6))
        except OSError as error:
            kind = (
                "the kernel can't redirect" if isinstance(error, RedirectError) else "no listener"
            )
            log.info("no port-forward for this pod: %s: %s", kind, error)
            return
        await _serve(listeners, connect)


def _listen() -> list[socket.socket]:
    """One for each family; IPv6 may be off."""
    found = [socket.create_server(("127.0.0.1", 0))]
    with contextlib.suppress(OSError):
        found.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
    return found


async def _serve(listeners: Sequence[socket.socket], connect: Connect) -> None:
    room = trio.Semaphore(_AT_ONCE)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            listener.setblocking(False)
            nursery.start_soon(_accept, listener, room, nursery, connect)


async def _accept(
    listener: socket.socket, room: trio.Semaphore, nursery: trio.Nursery, connect: Connect
) -> None:
    while True:
        await room.acquire()
        await trio.lowlevel.wait_readable(listener)
        try:
            accepted, _ = listener.accept()
        except OSError:  # it was reset while it waited, or we are out of descriptors
            room.release()
            await trio.sleep(_PAUSE)
            continue
        client = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
        nursery.start_soon(_forward, client, room, connect)


async def _forward(client: trio.SocketStream, room: trio.Semaphore, connect: Connect) -> None:
    port = client.socket.getsockname()[1]
    try:
        async with client:
            try:
                await _carry(client, port, connect)
            except (OSError, VmmError, trio.TooSlowError, trio.BrokenResourceError) as error:
                log.info("port-forward to %d: %s", port, error or type(error).__name__)
                # Closed like this the client gets a reset, as from a port without a server.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        room.release()


async def _carry(client: trio.SocketStream, port: int, connect: Connect) -> None:
    async with await connect() as connection:
        guest = connection.stream
        with trio.fail_after(_ANSWER_LIMIT):
            await guest.send_all(port.to_bytes(2, "big"))
            answer = await guest.receive_some(1)
        if answer != b"\0":
            code = answer[0] if answer else errno.EPIPE
            raise OSError(code, f"the guest: {os.strerror(code)}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, client, guest, nursery.cancel_scope)
            nursery.start_soon(_copy, guest, client, nursery.cancel_scope)


async def _copy(
    source: trio.SocketStream, target: trio.SocketStream, both: trio.CancelScope
) -> None:
    """One direction until its end; a break is the end of both."""
    try:
        while data := await source.receive_some(_CHUNK):
            await target.send_all(data)
        await target.send_eof()
    except trio.BrokenResourceError:
        both.cancel()
