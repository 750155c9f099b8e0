# SPDX-License-Identifier: Apache-2.0
"""The ttrpc server on the agent's loop, against the sans-IO client."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator
from typing import Any

import pytest

from agent.api import agent_pb2 as pb
from agent.loop import Future, Loop
from agent.server import Server
from agent.service import Services
from ttrpc.errors import Code, RpcError
from ttrpc.protocol import Connection, ResponseReceived, Role

SERVICE = "grpc.AgentService"


class Calls:
    """An implementation with one call of each kind."""

    def __init__(self) -> None:
        self.oom = Future()
        self.given_up = 0

    def GetMetrics(self, request: Any) -> Any:
        return pb.Metrics(metrics="m")

    def AddSwapPath(self, request: Any) -> Any:
        raise RpcError(Code.NOT_FOUND, f"no {request.path}")

    def SetPolicy(self, request: Any) -> Any:
        raise ValueError("a bug")

    def CopyFile(self, request: Any) -> Any:
        return pb.Metrics(metrics=str(len(request.data)))

    def GetOOMEvent(self, request: Any) -> Any:
        def wait() -> Generator[Any, Any, Any]:
            try:
                return pb.OOMEvent(container_id=(yield self.oom))
            except GeneratorExit:
                self.given_up += 1
                raise

        return wait()


class Peer:
    """A loop with a server, and one client of it."""

    def __init__(self, *, clients_follow: bool = False) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.calls = Calls()
        self.server = Server(self.loop, Services((pb, self.calls)))
        self.closed = False
        self.socket, other = socket.socketpair()
        self.socket.setblocking(False)
        self.server.serve(other.detach(), on_close=self._on_close, clients_follow=clients_follow)
        self.client = Connection(Role.CLIENT)

    def _on_close(self) -> None:
        self.closed = True

    def send(self, method: str, request: Any, service: str = SERVICE, **more: Any) -> int:
        stream = self.client.send_request(service, method, request.SerializeToString(), **more)
        self.write(self.client.data_to_send())
        return stream

    def write(self, data: bytes) -> None:
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                self.loop.turn()

    def answer(self) -> ResponseReceived:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.loop.after(0.05, lambda: None)
            self.loop.turn()
            try:
                data = self.socket.recv(1 << 20)
            except BlockingIOError:
                continue
            for event in self.client.receive_data(data):
                assert isinstance(event, ResponseReceived)
                return event
        raise TimeoutError


@pytest.fixture
def peer() -> Peer:
    return Peer()


def test_answers_and_statuses(peer: Peer) -> None:
    peer.send("GetMetrics", pb.GetMetricsRequest())
    assert pb.Metrics.FromString(peer.answer().payload).metrics == "m"
    peer.send("AddSwapPath", pb.AddSwapPathRequest(path="/x"))
    answer = peer.answer()
    assert (answer.code, answer.message) == (Code.NOT_FOUND, "no /x")
    peer.send("SetPolicy", pb.SetPolicyRequest())
    answer = peer.answer()
    assert (answer.code, answer.message) == (Code.INTERNAL, "ValueError: a bug")
    for service, method in ((SERVICE, "Nothing"), ("grpc.Nobody", "GetMetrics")):
        peer.send(method, pb.GetMetricsRequest(), service)
        assert peer.answer().code == Code.UNIMPLEMENTED
    peer.client.send_request(SERVICE, "AddSwapPath", b"\xff\xff")
    peer.write(peer.client.data_to_send())
    assert peer.answer().code == Code.INVALID_ARGUMENT
    assert not peer.errors


def test_a_large_request_in_pieces(peer: Peer) -> None:
    peer.send("CopyFile", pb.CopyFileRequest(data=bytes(3_000_000)))
    assert pb.Metrics.FromString(peer.answer().payload).metrics == "3000000"


def test_an_answer_that_comes_later_than_others(peer: Peer) -> None:
    waiting = peer.send("GetOOMEvent", pb.GetOOMEventRequest())
    peer.send("GetMetrics", pb.GetMetricsRequest())
    peer.answer()
    peer.calls.oom.set("c1")
    answer = peer.answer()
    assert answer.stream_id == waiting
    assert pb.OOMEvent.FromString(answer.payload).container_id == "c1"


def test_a_deadline(peer: Peer) -> None:
    peer.send("GetOOMEvent", pb.GetOOMEventRequest(), timeout_nano=20_000_000)
    assert peer.answer().code == Code.DEADLINE_EXCEEDED
    assert peer.calls.given_up == 1


def test_a_malformed_frame_closes_the_connection(peer: Peer) -> None:
    peer.send("GetOOMEvent", pb.GetOOMEventRequest())
    peer.loop.turn()
    peer.write(b"\xff" * 64)
    while not peer.closed:
        peer.loop.turn()
    assert peer.calls.given_up == 1
    assert not peer.errors


def test_a_client_that_leaves(peer: Peer) -> None:
    peer.send("GetOOMEvent", pb.GetOOMEventRequest())
    peer.loop.turn()
    peer.socket.close()
    while not peer.closed:
        peer.loop.turn()
    assert peer.calls.given_up == 1
    peer.calls.oom.set("c1")
    assert not peer.errors


def test_clients_that_follow_each_other_on_one_line() -> None:
    peer = Peer(clients_follow=True)
    peer.send("GetOOMEvent", pb.GetOOMEventRequest())
    peer.send("GetMetrics", pb.GetMetricsRequest())
    peer.answer()
    peer.client = Connection(Role.CLIENT)
    peer.send("GetMetrics", pb.GetMetricsRequest())
    answer = peer.answer()
    assert (answer.stream_id, answer.code) == (1, 0)
    assert peer.calls.given_up == 1
