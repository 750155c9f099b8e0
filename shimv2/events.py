# SPDX-License-Identifier: Apache-2.0
"""Task events to containerd, in order, kept until it answers.

One task sends one event at a time, so the order of events is the order of calls.  While
containerd is away the queue waits: an exit or delete event is kept until it is taken,
another is given up after five tries (DESIGN decision 12).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import trio
from google.protobuf.message import Message

from shimv2.api import events_service_pb2, task_events_pb2
from shimv2.timestamps import put
from ttrpc.errors import Code, RpcError

if TYPE_CHECKING:
    from ttrpc.client import Client

log = logging.getLogger("events")

_SEND_LIMIT = 5.0  # seconds, containerd's own limit
_TRIES = 5
_QUEUE_LIMIT = 2048
_BACKOFF_STEP = 1.0
_BACKOFF_LIMIT = 5.0

_SERVICE = events_service_pb2.DESCRIPTOR.services_by_name["Events"]
TOPICS: dict[type[Message], str] = {
    task_events_pb2.TaskCreate: "/tasks/create",
    task_events_pb2.TaskStart: "/tasks/start",
    task_events_pb2.TaskExit: "/tasks/exit",
    task_events_pb2.TaskDelete: "/tasks/delete",
    task_events_pb2.TaskOOM: "/tasks/oom",
    task_events_pb2.TaskExecAdded: "/tasks/exec-added",
    task_events_pb2.TaskExecStarted: "/tasks/exec-started",
    task_events_pb2.TaskPaused: "/tasks/paused",
    task_events_pb2.TaskResumed: "/tasks/resumed",
}
_REFUSED = (Code.INVALID_ARGUMENT, Code.PERMISSION_DENIED, Code.OUT_OF_RANGE)
_KEPT = (task_events_pb2.TaskExit, task_events_pb2.TaskDelete)


class EventPublisher:
    """The queue of events of one shim.

    Args:
        address: containerd's ttrpc socket; "" (CRI-O has none) sends events to the log.
        namespace: containerd's namespace, part of every event.
    """

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._queue: deque[tuple[events_service_pb2.ForwardRequest, bool]] = deque()
        self._wake = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    def publish(self, event: Message) -> None:
        """Queue an event; never waits.  At 2048 the oldest that may be dropped is."""
        topic = TOPICS[type(event)]
        if not self._address:
            log.info("event %s: %s", topic, str(event).replace("\n", " "))
            return
        request = events_service_pb2.ForwardRequest()
        put(request.envelope.timestamp, time.time_ns())
        request.envelope.namespace = self._namespace
        request.envelope.topic = topic
        # containerd's type registry knows events by their bare name.
        request.envelope.event.type_url = event.DESCRIPTOR.full_name
        request.envelope.event.value = event.SerializeToString()
        if len(self._queue) >= _QUEUE_LIMIT:
            self._drop_oldest()
        self._queue.append((request, isinstance(event, _KEPT)))
        if self._idle.is_set():
            self._idle = trio.Event()
        self._wake.set()

    async def run(self) -> None:
        """Send events for ever; cancelled at the end of the shim."""
        while True:
            if not self._queue:
                self._idle.set()
                self._wake = trio.Event()
                await self._wake.wait()
            await self._send_over_one_connection()

    async def flush(self, limit: float) -> bool:
        """Wait until all events are with containerd, at most `limit` seconds."""
        with trio.move_on_after(limit):
            await self._idle.wait()
            return True
        log.warning("%d events were not taken by containerd", len(self._queue))
        return False

    async def _send_over_one_connection(self) -> None:
        from ttrpc.client import Client

        failures = 0
        while self._queue:
            try:
                stream = await trio.open_unix_socket(self._address)
            except OSError as error:
                failures += 1
                log.debug("containerd's event socket %s: %s", self._address, error)
                self._count_try(failures)
                await trio.sleep(min(failures * _BACKOFF_STEP, _BACKOFF_LIMIT))
                continue
            taken = True
            async with Client(stream) as client:
                while self._queue and (taken := await self._send(client)):
                    failures = 0
            # There may be events again that came while the connection was closed.
            if not taken:
                failures += 1
                self._count_try(failures)
                await trio.sleep(min(failures * _BACKOFF_STEP, _BACKOFF_LIMIT))

    async def _send(self, client: Client) -> bool:
        request, _ = self._queue[0]
        try:
            await client.stub(_SERVICE).Forward(request, timeout=_SEND_LIMIT)
        except RpcError as error:
            if error.code not in _REFUSED:
                log.debug("event %s not taken: %s", request.envelope.topic, error)
                return False
            # An answer, and it would be the same next time: the events behind it must not wait.
            log.error("event %s refused by containerd: %s", request.envelope.topic, error)
        if self._queue and self._queue[0][0] is request:
            self._queue.popleft()
        return True

    def _count_try(self, failures: int) -> None:
        if failures % _TRIES == 0 and self._queue and not self._queue[0][1]:
            request, _ = self._queue.popleft()
            log.warning("event %s dropped after %d tries", request.envelope.topic, _TRIES)

    def _drop_oldest(self) -> None:
        for index, (_, kept) in enumerate(self._queue):
            # The head may be on its way to containerd.
            if not kept and index > 0:
                del self._queue[index]
                return
