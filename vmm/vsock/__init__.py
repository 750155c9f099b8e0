# SPDX-License-Identifier: Apache-2.0
"""Streams between the host and a guest's ports, by whatever this host and VMM offer."""

from __future__ import annotations

from pathlib import Path

from vmm.errors import VmmConfigError
from vmm.vsock import vhost
from vmm.vsock.channel import VsockChannel, VsockConnection, VsockNoAnswer, VsockRefused
from vmm.vsock.hybrid import HybridChannel
from vmm.vsock.serial import SerialChannel
from vmm.vsock.vhost import VhostChannel
from vmm.vsock.vhost_user_channel import DEFAULT_CID, VhostUserChannel

__all__ = [
    "HybridChannel",
    "SerialChannel",
    "VhostChannel",
    "VhostUserChannel",
    "VsockChannel",
    "VsockConnection",
    "VsockNoAnswer",
    "VsockRefused",
    "open_channel",
    "resolve",
]


def resolve(kind: str) -> str:
    """What ``auto`` stands for on this host; other kinds as they are."""
    if kind != "auto":
        return kind
    return "vhost" if vhost.available() else "vhost-user"


def open_channel(
    kind: str,
    state_dir: Path,
    *,
    cid: int = DEFAULT_CID,
    socket: Path | None = None,
) -> VsockChannel:
    """A channel to one guest, to be entered by ``async with``.

    Args:
        kind: ``vhost`` (the kernel's device), ``vhost-user`` (our own), ``hybrid`` (the VMM's),
            ``serial`` (virtio-serial, the agent's stream only), or ``auto``: vhost where
            /dev/vhost-vsock can be opened, else vhost-user.
        state_dir: an existing private directory for sockets; keep its path below 90 bytes.
        cid: the guest's CID, for vhost-user and hybrid (the kernel's is found by trial).
        socket: for hybrid and serial the VMM's socket, if not ``state_dir/vsock.sock`` or
            ``state_dir/agent.sock``.

    Raises:
        VmmConfigError: there is no such kind.
    """
    match kind := resolve(kind):
        case "vhost":
            return VhostChannel()
        case "vhost-user":
            return VhostUserChannel(socket or state_dir / "vsock.sock", cid)
        case "hybrid":
            return HybridChannel(socket or state_dir / "vsock.sock", cid)
        case "serial":
            return SerialChannel(socket or state_dir / "agent.sock")
    raise VmmConfigError(f"vsock kind {kind!r}: auto, vhost, vhost-user, hybrid or serial")
