# SPDX-License-Identifier: Apache-2.0
"""ttrpc over a virtio-serial port, for guests without vsock."""

from __future__ import annotations

import os
import select

from agent.loop import Loop
from agent.server import Server

_PORTS = "/dev/virtio-ports"
_SYSFS = "/sys/class/virtio-ports"
_INTERVAL = 0.02  # seconds between looks for the host's end: the kernel has no event for it


class SerialPort:
    """Serves a port as long as the host has its end open, and again when it has it open again.

    Raises:
        FileNotFoundError: no port has that name.
    """

    def __init__(self, loop: Loop, server: Server, name: str) -> None:
        self._loop = loop
        self._server = server
        self._path = find_port(name)
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self._await_host()

    def _await_host(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self._loop.after(_INTERVAL, self._await_host)
        else:
            self._server.serve(self._fd, on_close=self._closed, clients_follow=True)

    def _closed(self) -> None:
        self._loop.after(_INTERVAL, self._open)


def find_port(name: str) -> str:
    """The device of a virtio-serial port; without udev nobody makes /dev/virtio-ports.

    Raises:
        FileNotFoundError: no port has that name.
    """
    path = f"{_PORTS}/{name}"
    if os.path.exists(path):
        return path
    try:
        ports = os.listdir(_SYSFS)
    except FileNotFoundError:
        ports = []
    for port in ports:
        try:
            with open(f"{_SYSFS}/{port}/name", encoding="utf-8") as file:
                if file.read().strip() == name:
                    return f"/dev/{port}"
        except FileNotFoundError:  # a console's has none
            continue
    raise FileNotFoundError(f"no virtio-serial port is called {name!r}")
