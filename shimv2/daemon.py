# SPDX-License-Identifier: Apache-2.0
"""The long-lived process of a pod: one sandbox, its services on one socket."""

from __future__ import annotations

import ctypes
import logging
import signal
import socket

import trio

from shimv2 import log as shim_log
from shimv2.api import sandbox_pb2, task_v2_pb2, task_v3_pb2
from shimv2.events import EventPublisher
from shimv2.management import listener as management
from shimv2.namespaces import enter_own_mount_namespace
from shimv2.observed import Observed
from shimv2.sandbox import Sandbox, SandboxSettings
from shimv2.sandbox_service import SandboxService
from shimv2.state import remove_sandbox, remove_socket
from shimv2.task_service import TaskService
from shimv2.timeline import Timeline
from ttrpc.server import Server

log = logging.getLogger("shim")

_PR_SET_NAME = 15
_FLUSH_LIMIT = 5.0  # seconds for the last events
_DRAIN_LIMIT = 1.0  # seconds for the answers under way when the server closes
_LINGER = 0.2  # of these, for containerd to close first


def serve(
    *,
    namespace: str,
    sandbox_id: str,
    bundle: str,
    grpc_address: str,
    ttrpc_address: str,
    options: bytes,
    debug: bool,
    listener: socket.socket,
) -> int:
    """Run the daemon until its sandbox is shut down; returns the exit status."""
    shim_log.set_up(bundle, {"sandbox": sandbox_id, "namespace": namespace}, debug=debug)
    timeline = Timeline()
    timeline.mark("imported")
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"kata-shim", 0, 0, 0)
    path = listener.getsockname()
    try:
        host_mounts = enter_own_mount_namespace()
        settings = SandboxSettings(
            namespace=namespace,
            sandbox_id=sandbox_id,
            bundle=bundle,
            containerd=grpc_address,
            socket=path,
            options=options,
            host_mounts=host_mounts,
        )
        trio.run(_main, settings, ttrpc_address, listener, timeline)
    except BaseException:
        log.critical("the shim ends by an error of its own", exc_info=True)
        return 1
    finally:
        listener.close()
        remove_socket(path)
        for problem in remove_sandbox(sandbox_id, namespace):
            log.warning("left behind: %s", problem)
    return 0


async def _main(
    settings: SandboxSettings, ttrpc_address: str, listener: socket.socket, timeline: Timeline
) -> None:
    events = EventPublisher(ttrpc_address, settings.namespace)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.run)
        async with Sandbox(settings, events, timeline) as sandbox:
            server = Server()
            for messages in (task_v2_pb2, task_v3_pb2):
                service = Observed(TaskService(sandbox, messages), sandbox.calls)
                server.register(messages.DESCRIPTOR.services_by_name["Task"], service)
            server.register(
                sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"], SandboxService(sandbox)
            )
            listener.setblocking(False)
            trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))
            await nursery.start(server.serve_listeners, [trio_listener])
            nursery.start_soon(_shut_down_on_signal, sandbox)
            nursery.start_soon(management.serve, sandbox)
            sandbox.start_early()
            await sandbox.wait_shutdown()
            await sandbox.stop()
            await events.flush(_FLUSH_LIMIT)
            await server.shutdown(_DRAIN_LIMIT, linger=_LINGER)
        nursery.cancel_scope.cancel()


async def _shut_down_on_signal(sandbox: Sandbox) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("signal %d: shutting down", number)
            await sandbox.shutdown(now=True)
