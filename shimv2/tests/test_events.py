# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from shimv2 import events as module
from shimv2.api import events_service_pb2, task_events_pb2
from shimv2.events import EventPublisher
from ttrpc.client import Client
from ttrpc.errors import Code, RpcError
from ttrpc.server import Server

SERVICE = events_service_pb2.DESCRIPTOR.services_by_name["Events"]


class Containerd:
    """Its event service, on a unix socket; refuses while `refuse` is set."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.got: list[tuple[str, str]] = []
        self.refuse = False
        self.invalid: set[str] = set()  # topics
        self._scope = trio.CancelScope()

    async def Forward(self, request, context):
        if self.refuse:
            raise RpcError(Code.UNAVAILABLE, "not now")
        envelope = request.envelope
        if envelope.topic in self.invalid:
            raise RpcError(Code.INVALID_ARGUMENT, "not an event")
        self.got.append((envelope.topic, envelope.event.type_url))
        assert envelope.namespace == "ns"
        assert envelope.timestamp.seconds > 1_600_000_000
        from google.protobuf import empty_pb2

        return empty_pb2.Empty()

    async def serve(self, task_status=trio.TASK_STATUS_IGNORED):
        server = Server()
        server.register(SERVICE, self)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        listener.setblocking(False)
        with self._scope:
            await server.serve_listeners(
                [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
                task_status=task_status,
            )


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "c.ttrpc")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "_BACKOFF_STEP", 0.01)


def exit_event(container_id: str):
    return task_events_pb2.TaskExit(container_id=container_id, id=container_id)


async def test_events_arrive_in_order_with_their_topic(path, nursery):
    containerd = Containerd(path)
    await nursery.start(containerd.serve)
    publisher = EventPublisher(f"unix://{path}", "ns")
    nursery.start_soon(publisher.run)
    publisher.publish(task_events_pb2.TaskCreate(container_id="c"))
    publisher.publish(task_events_pb2.TaskStart(container_id="c"))
    publisher.publish(exit_event("c"))
    assert await publisher.flush(5)
    assert containerd.got == [
        ("/tasks/create", "containerd.events.TaskCreate"),
        ("/tasks/start", "containerd.events.TaskStart"),
        ("/tasks/exit", "containerd.events.TaskExit"),
    ]
    nursery.cancel_scope.cancel()


async def test_an_exit_waits_for_a_containerd_that_is_away(path, nursery):
    publisher = EventPublisher(path, "ns")
    nursery.start_soon(publisher.run)
    publisher.publish(task_events_pb2.TaskPaused(container_id="c"))
    publisher.publish(exit_event("c"))
    assert not await publisher.flush(0.3)  # long enough for all tries of the first
    containerd = Containerd(path)
    await nursery.start(containerd.serve)
    assert await publisher.flush(5)
    assert [topic for topic, _ in containerd.got] == ["/tasks/exit"]
    nursery.cancel_scope.cancel()


async def test_a_refused_event_is_sent_again(path, nursery):
    containerd = Containerd(path)
    containerd.refuse = True
    await nursery.start(containerd.serve)
    publisher = EventPublisher(path, "ns")
    nursery.start_soon(publisher.run)
    publisher.publish(exit_event("c"))
    assert not await publisher.flush(0.1)
    containerd.refuse = False
    assert await publisher.flush(5)
    assert len(containerd.got) == 1
    nursery.cancel_scope.cancel()


async def test_without_an_address_events_are_logged(caplog):
    caplog.set_level("INFO")
    EventPublisher("", "ns").publish(exit_event("c"))
    assert "/tasks/exit" in caplog.text


async def test_the_queue_is_bounded_and_keeps_exits(path):
    publisher = EventPublisher(path, "ns")
    publisher.publish(exit_event("first"))
    for number in range(3000):
        publisher.publish(task_events_pb2.TaskPaused(container_id=str(number)))
    publisher.publish(exit_event("last"))
    assert len(publisher._queue) <= 2048
    kept = [request for request, keep in publisher._queue if keep]
    assert len(kept) == 2


async def test_an_event_that_is_refused_for_good_does_not_hold_back_the_others(path, nursery):
    containerd = Containerd(path)
    containerd.invalid.add("/tasks/exit")
    await nursery.start(containerd.serve)
    publisher = EventPublisher(f"unix://{path}", "ns")
    nursery.start_soon(publisher.run)
    publisher.publish(exit_event("c"))
    publisher.publish(task_events_pb2.TaskDelete(container_id="c"))
    assert await publisher.flush(5)
    assert [topic for topic, _ in containerd.got] == ["/tasks/delete"]


async def test_an_event_while_the_connection_closes_is_no_failure(path, nursery, monkeypatch):
    monkeypatch.setattr(module, "_BACKOFF_STEP", 60)
    containerd = Containerd(path)
    await nursery.start(containerd.serve)
    publisher = EventPublisher(f"unix://{path}", "ns")
    leave = Client.__aexit__
    late = [task_events_pb2.TaskDelete(container_id="c")]

    async def leave_later(self, *error):
        await leave(self, *error)
        if late:
            publisher.publish(late.pop())

    monkeypatch.setattr(Client, "__aexit__", leave_later)
    nursery.start_soon(publisher.run)
    publisher.publish(exit_event("c"))
    with trio.fail_after(5):
        while len(containerd.got) < 2:
            await trio.sleep(0.01)
    assert await publisher.flush(1)
    nursery.cancel_scope.cancel()
