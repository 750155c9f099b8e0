# SPDX-License-Identifier: Apache-2.0
"""virtio-serial as a channel: one stream, for the agent's ttrpc, where a guest has no vsock."""

from __future__ import annotations

import os
from pathlib import Path

import trio

from vmm.hypervisor import SerialDevice
from vmm.vsock.channel import VsockChannel, VsockConnection, VsockRefused

AGENT_PORT = 1024
PORT_NAME = "agent.channel.0"


class SerialConnection(VsockConnection):
    """The one stream.  Gives its place back when it is closed."""

    def __init__(self, channel: SerialChannel, stream: trio.SocketStream) -> None:
        super().__init__(stream, 0)
        self._channel = channel

    def abort(self) -> None:
        self._channel._current = None
        super().abort()

    async def aclose(self) -> None:
        self._channel._current = None
        await super().aclose()


class SerialChannel(VsockChannel):
    """Connects to a virtio-serial port through the unix socket that the VMM listens on.

    The VMM holds back what is sent before the guest has opened the port, so a connection can be
    made before the agent is up and says nothing about it.

    Args:
        path: the VMM's socket.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._current: SerialConnection | None = None

    @property
    def device(self) -> SerialDevice:
        return SerialDevice(id="agent0", name=PORT_NAME, socket=self._path)

    async def _connect(self, port: int) -> VsockConnection:
        if port != AGENT_PORT:
            raise VsockRefused(f"virtio-serial has no port {port}, only the agent's")
        current = self._current
        if current is not None and current.stream.socket.fileno() != -1:
            raise VsockRefused("the virtio-serial port is in use")
        try:
            stream = await trio.open_unix_socket(os.fspath(self._path))
        except OSError as error:
            raise VsockRefused(f"virtio-serial socket {self._path}: {error}") from None
        self._current = SerialConnection(self, stream)
        return self._current
