# SPDX-License-Identifier: Apache-2.0
"""What a sandbox could leave on the host: to be compared before and after."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

_DIRECTORIES = (
    Path("/run/vc/vm"),
    Path("/run/vc/sbs"),
    Path("/run/kata-containers/shared/sandboxes"),
    Path("/run/containerd/s"),
)
_PROGRAMS = ("qemu-system", "virtiofsd", "containerd-shim", "kata-shim")


@dataclass(frozen=True)
class Leftovers:
    """Names of everything of ours on the host at one moment.

    Attributes:
        processes: pid and command of VMMs, virtiofsds and shims.
        files: entries of the state directories and shim sockets.
        mounts: mount points of this mount namespace.
        cgroups: directories whose name marks them as a sandbox's.
        interfaces: network interfaces of this network namespace.
        loops: attached loop devices.
    """

    processes: frozenset[str]
    files: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    interfaces: frozenset[str]
    loops: frozenset[str]

    @classmethod
    def of_host(cls) -> Self:
        """What there is now."""
        return cls(
            frozenset(_processes()),
            frozenset(str(p) for d in _DIRECTORIES if d.exists() for p in d.iterdir()),
            frozenset(
                line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
            ),
            frozenset(_cgroups()),
            frozenset(os.listdir("/sys/class/net")),
            frozenset(
                p.parent.parent.name for p in Path("/sys/block").glob("loop*/loop/backing_file")
            ),
        )

    def since(self, before: Leftovers) -> dict[str, list[str]]:
        """What is here now and was not then; empty if nothing is."""
        found = {}
        for field in fields(self):
            new = getattr(self, field.name) - getattr(before, field.name)
            if new:
                found[field.name] = sorted(new)
        return found


def _processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        words = [name, *(os.path.basename(word.decode(errors="replace")) for word in command[:2])]
        if any(word.startswith(_PROGRAMS) for word in words):
            found.append(f"{entry.name} {name}")
    return found


def _cgroups() -> list[str]:
    found = []
    for root, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(root, d) for d in directories if "kata" in d]
    return found
