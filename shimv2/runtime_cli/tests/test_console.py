# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
import pty
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimv2.runtime_cli import console
from shimv2.runtime_cli.console import ConsoleError, attach, connect

Serve = Callable[[socket.socket], None]


@contextlib.contextmanager
def server(path: Path, serve: Serve) -> Iterator[None]:
    """One client on a unix socket, served in a thread that is joined at the end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            client, _ = listener.accept()
            with client:
                serve(client)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join(10)
        assert not thread.is_alive()


def read_line(client: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += client.recv(1)
    return line


def shell(client: socket.socket) -> None:
    """Says hello, answers every line in capitals, ends at ^D."""
    assert read_line(client) == b"CONNECT 1026\n"
    client.sendall(b"OK 5000\nhello\n")
    while data := client.recv(100):
        if b"\x04" in data:
            client.sendall(data.partition(b"\x04")[0].upper())
            return
        client.sendall(data.upper())


def test_pipes(tmp_path):
    source, source_write = os.pipe()
    sink_read, sink = os.pipe()
    os.write(source_write, b"uname\n")
    os.close(source_write)
    with server(tmp_path / "s", shell):
        stream, first = connect(tmp_path / "s")
        with stream:
            attach(stream, first, source, sink)
    os.close(sink)
    with open(sink_read, "rb") as output:
        assert output.read() == b"hello\nUNAME\n"
    os.close(source)


def test_refusal_names_the_setting(tmp_path):
    with (
        server(tmp_path / "s", lambda client: client.close()),
        pytest.raises(ConsoleError, match="debug_console_enabled = true"),
    ):
        connect(tmp_path / "s")


def test_not_a_hybrid_vsock(tmp_path):
    def http(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 400\n")
        client.recv(100)

    with (
        server(tmp_path / "s", http),
        pytest.raises(ConsoleError, match="unexpected line"),
    ):
        connect(tmp_path / "s")


def test_silence(tmp_path, monkeypatch):
    def mute(client: socket.socket) -> None:
        read_line(client)
        client.recv(1)

    monkeypatch.setattr(console, "HANDSHAKE_LIMIT", 0.05)
    with server(tmp_path / "s", mute), pytest.raises(ConsoleError, match="no answer"):
        connect(tmp_path / "s")


def test_no_socket(tmp_path):
    with pytest.raises(ConsoleError, match="No such file"):
        connect(tmp_path / "none")


def read_until(fd: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([fd], [], [], 10)
        assert ready, f"{wanted!r} not in {seen!r}"
        seen += os.read(fd, 1000)
    return seen


@pytest.mark.parametrize("end", [b"\x04", b"\x1d"])
def test_terminal_is_raw_and_restored(tmp_path, end, capsys):
    """^D ends the shell, ^] leaves it; ^C goes to the guest."""
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    sizes = []

    def guest(client: socket.socket) -> None:
        assert read_line(client) == b"CONNECT 1026\n"
        client.sendall(b"OK 5000\nready")
        sizes.append(read_line(client))
        with contextlib.suppress(ConnectionError):
            while (data := client.recv(100)) and b"\x04" not in data:
                client.sendall(b"<" + data + b">")

    def user() -> None:
        read_until(master, b"ready")
        os.write(master, b"\x03")
        read_until(master, b"<\x03>")
        os.write(master, end)

    termios.tcsetwinsize(slave, (50, 132))
    thread = threading.Thread(target=user)
    with server(tmp_path / "s", guest):
        stream, first = connect(tmp_path / "s")
        thread.start()
        with stream:
            attach(stream, first, slave, slave)
    thread.join(10)
    assert termios.tcgetattr(slave) == before
    assert sizes == [b" stty rows 50 columns 132 2>/dev/null\n"]
    os.close(master)
    os.close(slave)
