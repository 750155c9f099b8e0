# SPDX-License-Identifier: Apache-2.0
"""The sandboxes of this host, as their shims recorded them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shimv2 import state


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One line of the list; times in seconds, memory (PSS) in bytes."""

    id: str
    namespace: str
    alive: bool
    pids: dict[str, int]
    age: float
    memory: int


class NoSuchSandboxError(Exception):
    """No sandbox, or more than one, has an id that begins like that."""


def sandboxes() -> Iterator[Sandbox]:
    """All that have a record, in the order of their ids."""
    for name, record in _records():
        living = {
            role: pid
            for role, (pid, started) in record.processes.items()
            if state.start_time(pid) == started
        }
        yield Sandbox(
            id=name,
            namespace=record.namespace,
            alive=record.shim_alive(),
            pids=living,
            age=_age(record.processes.get("shim", (0, 0))[1]),
            memory=sum(_memory(pid) for pid in living.values()),
        )


def _records() -> Iterator[tuple[str, state.SandboxRecord]]:
    try:
        names = sorted(os.listdir(state.SANDBOXES))
    except FileNotFoundError:
        return
    for name in names:
        record = state.SandboxRecord.load(name)
        if record is not None:
            yield name, record


def find(prefix: str) -> str:
    """The id of the one sandbox whose id begins with `prefix`.

    Raises:
        NoSuchSandboxError: says which there are.
    """
    known = [name for name, _ in _records()]
    if prefix in known:
        return prefix
    matching = [name for name in known if prefix and name.startswith(prefix)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise NoSuchSandboxError(f"{prefix!r} is the start of {', '.join(matching)}")
    there = f"there are: {', '.join(known)}" if known else "there are none"
    raise NoSuchSandboxError(f"no sandbox {prefix!r} on this host ({there})")


def _age(started: int) -> float:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, uptime - started / os.sysconf("SC_CLK_TCK")) if started else 0.0


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0
