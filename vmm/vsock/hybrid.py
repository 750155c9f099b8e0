# SPDX-License-Identifier: Apache-2.0
"""Hybrid vsock: the VMM's own device, reached through a unix socket of the VMM."""

from __future__ import annotations

import os
from pathlib import Path

import trio

from vmm.hypervisor import VsockDevice
from vmm.vsock.channel import CONNECT_TIMEOUT, VsockChannel, VsockConnection, VsockRefused
from vmm.vsock.hybrid_protocol import ClientHandshake, HandshakeError

#: What a VMM's thread may need to move what it holds into a socket that was just emptied.
SETTLE_SECONDS = 0.02


class HybridConnection(VsockConnection):
    """A stream through a VMM's unix socket."""

    async def delivered(self) -> None:
        # The VMM can't be asked what it still holds, only given the time to hand it over.
        with trio.move_on_after(SETTLE_SECONDS):
            await trio.lowlevel.wait_readable(self.stream.socket.fileno())


class HybridChannel(VsockChannel):
    """Connects through the socket of a VMM that has vsock built in.

    Args:
        path: the VMM's socket (`Hypervisor.hybrid_vsock_socket`); may appear later.
        cid: the guest's, for the VMM's configuration.
    """

    def __init__(self, path: Path, cid: int) -> None:
        super().__init__()
        self._path = path
        self._cid = cid

    @property
    def device(self) -> VsockDevice:
        return VsockDevice(id="vsock0", cid=self._cid)

    async def _connect(self, port: int) -> VsockConnection:
        handshake = ClientHandshake()
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                stream = await trio.open_unix_socket(os.fspath(self._path))
                try:
                    await stream.send_all(handshake.request(port))
                    # A byte at a time near the end: what follows the line is the stream's.
                    while not handshake.receive(await stream.receive_some(1)):
                        pass
                except BaseException:
                    await trio.aclose_forcefully(stream)
                    raise
        except (HandshakeError, OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            # VMMs refuse by silently closing; a socket that isn't there yet is no different.
            raise VsockRefused(f"guest port {port} through {self._path}: {error}") from None
        return HybridConnection(stream, handshake.port)
