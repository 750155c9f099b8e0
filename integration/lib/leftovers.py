# SPDX-License-Identifier: Apache-2.0
"""What a test's sandboxes have left on the host.

Everything of a sandbox carries its id, so others may run on the same host meanwhile.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_STATE = (
    Path("/run/vc/vm"),
    Path("/run/vc/sbs"),
    Path("/run/kata-containers/shared/sandboxes"),
)
_SOCKETS = Path("/run/containerd/s")


def left_by(mark: str) -> dict[str, list[str]]:
    """Processes, files, mounts and cgroups whose name holds `mark`; empty if there is nothing.

    Shim sockets are named by a digest: one that nobody listens on is left by somebody.
    """
    found = {
        "processes": _processes(mark),
        "files": [str(p) for d in _STATE if d.exists() for p in d.iterdir() if mark in p.name],
        "sockets": [str(p) for p in _SOCKETS.iterdir() if _dead(p)] if _SOCKETS.exists() else [],
        "mounts": [
            line.split(" ")[4]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if mark in line
        ],
        "cgroups": [
            os.path.join(root, name)
            for root, names, _ in os.walk("/sys/fs/cgroup")
            for name in names
            if mark in name
        ],
        "loop devices": [
            path.parent.parent.name
            for path in Path("/sys/block").glob("loop*/loop/backing_file")
            if mark in path.read_text()
        ],
    }
    return {kind: names for kind, names in found.items() if names}


def _processes(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            program = os.path.basename(command.split(" ", 1)[0])
        except OSError:
            continue
        if mark in command and program not in ("ctr", "pytest"):
            found.append(f"{entry.name} {command[:120]}")
    return found


def _dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
