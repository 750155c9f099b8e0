# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import forward
from agent.loop import READ, Loop

Dial = Callable[[int], socket.socket]


@pytest.fixture
def dial(tmp_path: Path) -> Iterator[Dial]:
    """Connects to a forward port, a unix socket here, and names a TCP port."""
    problems: list[BaseException] = []
    loop = Loop(problems.append)
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    path = str(tmp_path / "forward")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        listener.bind(path)
        listener.listen()
        loop.watch(listener.fileno(), READ, lambda _: forward.accept(listener, loop))
        wake, woken = os.pipe()
        loop.watch(wake, READ, lambda _: loop.stop())
        thread = threading.Thread(target=loop.run)
        thread.start()
        idle = len(os.listdir("/proc/self/fd"))
        clients: list[socket.socket] = []

        def connect(port: int) -> socket.socket:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            clients.append(client)
            client.settimeout(10)
            client.connect(path)
            client.sendall(port.to_bytes(2, "big"))
            return client

        yield connect
        for client in clients:
            client.close()
        deadline = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > idle:
            assert time.monotonic() < deadline, "a descriptor is left open"
            time.sleep(0.01)
        os.write(woken, b".")
        thread.join()
        os.close(wake)
        os.close(woken)
        loop._poll.close()
    assert not problems


def server(address: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = socket.create_server((address, 0), family=family)
    found.settimeout(10)
    return found


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_bytes_and_ends_go_both_ways(dial: Dial, address: str) -> None:
    with server(address) as listener:
        client = dial(listener.getsockname()[1])
        assert client.recv(1) == b"\0"
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"question")
            assert accepted.recv(100) == b"question"
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(100) == b"", "the host's end has reached the server"
            accepted.sendall(b"answer")
            assert client.recv(100) == b"answer"
        assert client.recv(1) == b""


def test_more_than_the_buffers_hold(dial: Dial) -> None:
    data = os.urandom(16 << 20)
    with server() as listener:
        client = dial(listener.getsockname()[1])
        assert client.recv(1) == b"\0"
        accepted, _ = listener.accept()
        with accepted:
            sender = threading.Thread(target=lambda: (client.sendall(data), client.close()))
            sender.start()
            found = bytearray()
            while piece := accepted.recv(1 << 20):
                found += piece
            sender.join()
    assert found == data


def test_nobody_listens(dial: Dial) -> None:
    with server() as listener:
        port = listener.getsockname()[1]
    client = dial(port)
    assert client.recv(10) == bytes([errno.ECONNREFUSED])
    assert client.recv(1) == b""


def test_a_server_that_resets(dial: Dial) -> None:
    with server() as listener:
        client = dial(listener.getsockname()[1])
        assert client.recv(1) == b"\0"
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        accepted.close()
        assert client.recv(1) == b""


def test_the_host_leaves_before_the_port(dial: Dial) -> None:
    client = dial(0)
    client.close()
