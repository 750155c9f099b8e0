# SPDX-License-Identifier: Apache-2.0
"""The sandboxes of this host that have a management socket, of either of Kata's runtimes too."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from shimv2 import state

#: Where Kata's runtime in Rust has its sockets.
RUST_SANDBOXES = Path("/run/kata")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One of them.

    Attributes:
        labels: of all its samples, as Kata calls them; what of the pod is not known is not there.
    """

    id: str
    socket: Path
    labels: dict[str, str] = field(default_factory=dict)


def sandboxes() -> list[Sandbox]:
    """In the order of their ids.  They may be gone the moment after."""
    found: dict[str, Sandbox] = {}
    for directory in (state.SANDBOXES, RUST_SANDBOXES):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            socket = Path(directory, name, state.MANAGEMENT_SOCKET)
            if socket.is_socket() and name not in found:
                found[name] = Sandbox(name, socket, _labels(name))
    return [found[name] for name in sorted(found)]


def _labels(sandbox_id: str) -> dict[str, str]:
    record = state.SandboxRecord.load(sandbox_id)
    pod = record.pod if record is not None else {}
    labels = {f"cri_{what}": pod[what] for what in ("uid", "name", "namespace") if what in pod}
    return {"sandbox_id": sandbox_id, **labels}
