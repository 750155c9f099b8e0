# SPDX-License-Identifier: Apache-2.0
"""The lab's side of the channel: runs one command at a time for the owner of the lab.

Runs by the lab's own Python from a copy on its disk, as `pykata-lab.service` has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import selectors
import signal
import subprocess
import termios
import time
from pathlib import Path

from integration.kvmlab import wire

PORT = Path("/dev/virtio-ports", wire.PORT)
CHUNK = 1 << 16


def open_port(limit: float = 60.0) -> int:
    """The port's descriptor, once udev has made its name."""
    end = time.monotonic() + limit
    while True:
        try:
            return os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


class Command:
    """The running command: its process group, and where its bytes come from and go to."""

    def __init__(self, request: dict[str, object]) -> None:
        argv = request["argv"]
        assert isinstance(argv, list)
        environment = {**os.environ, "HOME": "/root", **dict(request.get("env") or {})}  # type: ignore[call-overload]
        self.outputs: dict[int, int] = {}
        self.terminal = -1
        if request.get("tty"):
            leader, follower = pty.openpty()
            # In a session of its own, whose terminal it is.
            self._process = subprocess.Popen(
                ["setsid", "--ctty", *argv],
                stdin=follower,
                stdout=follower,
                stderr=follower,
                cwd=str(request.get("cwd") or "/root"),
                env=environment,
            )
            os.close(follower)
            self.terminal = self.stdin = leader
            self.outputs[leader] = wire.OUTPUT
            return
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=str(request.get("cwd") or "/root"),
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self.stdin = self._process.stdin.fileno()
        self.outputs[self._process.stdout.fileno()] = wire.OUTPUT
        self.outputs[self._process.stderr.fileno()] = wire.ERRORS

    def write(self, data: bytes) -> None:
        """Feed stdin; empty data is its end (for a terminal: ^D)."""
        try:
            if data:
                os.write(self.stdin, data)
            elif self.terminal >= 0:
                os.write(self.stdin, b"\4")
            elif self._process.stdin is not None:
                self._process.stdin.close()
        except OSError:  # it reads no more
            return

    def resize(self, data: bytes) -> None:
        if self.terminal >= 0:
            rows, columns = wire.WINDOW.unpack(data)
            termios.tcsetwinsize(self.terminal, (rows, columns))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        """Close what is open; background children keep their own ends."""
        if self.terminal >= 0:
            os.close(self.terminal)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Server:
    """One loop over the port and the command's outputs."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader = wire.Reader()
        self._selector = selectors.DefaultSelector()
        self._selector.register(port, selectors.EVENT_READ)
        self._command: Command | None = None

    def serve(self) -> None:
        self._send(wire.HELLO, os.uname().release.encode())
        while True:
            for key, _ in self._selector.select(0.05 if self._command else None):
                if key.fd == self._port:
                    self._from_owner()
                else:
                    self._from_command(key.fd)
            if self._command is not None and (status := self._command.poll()) is not None:
                self._finish(status)

    def _send(self, kind: int, data: bytes = b"") -> None:
        view = memoryview(wire.frame(kind, data))
        while view:
            view = view[os.write(self._port, view) :]

    def _from_owner(self) -> None:
        data = os.read(self._port, CHUNK)
        if not data:  # nobody is there
            time.sleep(0.1)
        for kind, body in self._reader.receive(data):
            if kind == wire.RUN and self._command is None:
                self._start(body)
            elif self._command is None:
                continue
            elif kind == wire.INPUT:
                self._command.write(body)
            elif kind == wire.SIZE:
                self._command.resize(body)
            elif kind == wire.KILL:
                self._command.kill()

    def _start(self, body: bytes) -> None:
        try:
            self._command = Command(json.loads(body))
        except (OSError, ValueError) as error:
            self._send(wire.ERRORS, f"{error}\n".encode())
            self._send(wire.EXIT, wire.STATUS.pack(127))
            return
        for fd in self._command.outputs:
            self._selector.register(fd, selectors.EVENT_READ)

    def _from_command(self, fd: int) -> None:
        assert self._command is not None
        try:
            data = os.read(fd, CHUNK)
        except OSError:  # EIO: nobody has the terminal open
            data = b""
        if data:
            self._send(self._command.outputs[fd], data)
        else:
            self._selector.unregister(fd)
            del self._command.outputs[fd]

    def _finish(self, status: int) -> None:
        """Send what is still in the pipes, and no more: a descendant may hold them."""
        assert self._command is not None
        for fd, kind in self._command.outputs.items():
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                while data := os.read(fd, CHUNK):
                    self._send(kind, data)
            self._selector.unregister(fd)
        self._command.close()
        self._command = None
        self._send(wire.EXIT, wire.STATUS.pack(status))


if __name__ == "__main__":
    Server(open_port()).serve()
