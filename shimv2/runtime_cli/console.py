# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime exec``: a shell of the guest on this terminal, through vsock.

The shim offers the guest's vsock ports on a unix socket of the sandbox (hybrid vsock); behind
port 1026 the agent runs a shell on a pty.  The stream carries the pty's bytes and nothing
else, so the window's size is set once, by a command typed into the shell.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from vmm.vsock.hybrid_protocol import ClientHandshake, HandshakeError

CONSOLE_PORT = 1026
HANDSHAKE_LIMIT = 10.0
LEAVE = b"\x1d"  # ^]
END_OF_INPUT = b"\x04"  # ^D: the pty's way to say that no more comes
_CHUNK = 16384


class ConsoleError(Exception):
    """No shell could be had; the message says what to change."""


def connect(path: Path, port: int = CONSOLE_PORT) -> tuple[socket.socket, bytes]:
    """A stream to a port of the guest, and what it has sent already.

    Raises:
        ConsoleError: no such socket, or nobody listens on that port.
    """
    handshake = ClientHandshake()
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(HANDSHAKE_LIMIT)
    try:
        stream.connect(os.fspath(path))
        stream.sendall(handshake.request(port))
        while not handshake.receive(stream.recv(64)):
            pass
    except (HandshakeError, ConnectionError) as error:
        stream.close()
        raise ConsoleError(
            f"the guest does not answer on its console port {port} ({error}): it has a console "
            "only with debug_console_enabled = true in section [agent.kata] of configuration.toml, "
            "set before the sandbox was started"
        ) from None
    except TimeoutError:
        stream.close()
        raise ConsoleError(
            f"the guest gave no answer on its console port in {HANDSHAKE_LIMIT:.0f} s"
        ) from None
    except OSError as error:
        stream.close()
        raise ConsoleError(f"{path}: {error.strerror}") from None
    stream.settimeout(None)
    return stream, handshake.rest


def attach(stream: socket.socket, first: bytes, source: int = 0, sink: int = 1) -> None:
    """Join a terminal (or pipes) and the shell until the shell ends or the user leaves by ^]."""
    terminal = os.isatty(source)
    if terminal:
        print("connected; ^D or exit ends the shell, ^] leaves it", file=sys.stderr)
        stream.sendall(_size_command(source))
    with _raw(source) if terminal else contextlib.nullcontext():
        _write(sink, first)
        _copy(stream, source, sink, terminal)


def _copy(stream: socket.socket, source: int, sink: int, terminal: bool) -> None:
    poller = select.poll()
    poller.register(stream, select.POLLIN)
    poller.register(source, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd != source:
                try:
                    data = stream.recv(_CHUNK)
                except ConnectionError:
                    return
                if not data:
                    return
                _write(sink, data)
                continue
            data = os.read(source, _CHUNK)
            if terminal and LEAVE in data:
                return
            try:
                stream.sendall(data or END_OF_INPUT)
            except ConnectionError:
                return
            if not data:
                poller.unregister(source)


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]


def _size_command(terminal: int) -> bytes:
    size = os.get_terminal_size(terminal)
    return b" stty rows %d columns %d 2>/dev/null\n" % (size.lines, size.columns)


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """The terminal passes each key on as it is; restored whatever happens."""
    before = termios.tcgetattr(terminal)

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
