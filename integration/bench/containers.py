# SPDX-License-Identifier: Apache-2.0
"""What a user of containers feels: start, exec, stop, stdio and files, by two runtimes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from integration.bench.figures import Figure
from integration.lib.containerd import RUNTIME, Containerd
from integration.lib.images import BUSYBOX_REFERENCE
from integration.lib.kata import wait_until

RUNTIMES = {"runc": "io.containerd.runc.v2", "kata": RUNTIME}

_FILES = """\
now() { read up rest < /proc/uptime; echo "$1 $up"; }
mkdir /d && cd /d
now create; seq 1 1000 | sed 's/^/f/' | xargs touch
now list; ls -l > /dev/null
now unlink; rm -f f*
now end
"""
_SEQUENTIAL_MIB = 256
_SEQUENTIAL = f"""\
now() {{ read up rest < /proc/uptime; echo "$1 $up"; }}
now write; dd if=/dev/zero of=/written bs=1M count={_SEQUENTIAL_MIB} 2>/dev/null
now read; dd if=/unread of=/dev/null bs=1M 2>/dev/null
now end
"""


class Workbench:
    """Runs one command after the other on one containerd, and takes the time."""

    def __init__(self, containerd: Containerd) -> None:
        self.containerd = containerd
        self._numbers = itertools.count(1)

    def new_id(self) -> str:
        return f"bench-{os.getpid()}-{next(self._numbers)}"

    def run(self, runtime: str, *command: str) -> float:
        """Seconds of a whole `ctr run --rm`."""
        start = time.monotonic()
        self.containerd.ctr(
            *("run", "--rm", "--runtime", RUNTIMES[runtime], BUSYBOX_REFERENCE),
            *(self.new_id(), *command),
        )
        return time.monotonic() - start

    @contextlib.contextmanager
    def container(self, runtime: str) -> Iterator[str]:
        """A container that sleeps."""
        container_id = self.new_id()
        self.containerd.ctr(
            *("run", "-d", "--runtime", RUNTIMES[runtime], BUSYBOX_REFERENCE),
            *(container_id, "sleep", "100000"),
        )
        try:
            yield container_id
        finally:
            self.containerd.ctr("task", "rm", "-f", container_id, check=False)
            self.containerd.ctr("container", "rm", container_id, check=False)

    def execute(self, container_id: str, *command: str) -> str:
        return self.containerd.ctr(
            *("task", "exec", "--exec-id", self.new_id(), container_id, *command)
        ).stdout

    def exec_seconds(self, container_id: str) -> float:
        start = time.monotonic()
        self.execute(container_id, "true")
        return time.monotonic() - start

    def stdout_rate(self, container_id: str) -> float:
        """MB/s of 256 MiB through an exec's stdout."""
        size = 256 << 20
        command = [
            *self.containerd.ctr_command(),
            *("task", "exec", "--exec-id", self.new_id(), container_id),
            *("dd", "if=/dev/zero", "bs=1M", f"count={size >> 20}"),
        ]
        start, got = 0.0, 0
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            while chunk := os.read(process.stdout.fileno(), 1 << 20):
                start = start or time.monotonic()
                got += len(chunk)
            seconds = time.monotonic() - start
        if got != size:
            raise RuntimeError(f"{got} of {size} bytes arrived")
        return size / seconds / 1e6

    def stop_seconds(self, runtime: str) -> float:
        """From `ctr task rm -f` until every process of the container is gone."""
        with self.container(runtime) as container_id:
            pids = self._pids(runtime, container_id)
            start = time.monotonic()
            self.containerd.ctr("task", "rm", "-f", container_id, check=False)
            returned = time.monotonic() - start
            wait_until(lambda: not any(map(_alive, pids)), 10, "all processes are gone")
            late = time.monotonic() - start
            return late if late - returned > 0.06 else returned

    def _pids(self, runtime: str, container_id: str) -> list[int]:
        if runtime == "kata":
            return [pid for pid, _ in state(container_id)["processes"].values()]
        text = self.containerd.ctr("task", "ps", container_id).stdout
        return [int(line.split()[0]) for line in text.splitlines()[1:]]

    def files(self, container_id: str) -> dict[str, float]:
        """Seconds to create, list and unlink 1,000 small files in the root file system."""
        lines = self.execute(container_id, "sh", "-c", _FILES).splitlines()
        stamps = [(name, float(at)) for name, at in (line.split() for line in lines)]
        self.execute(container_id, "rmdir", "/d")
        return {name: after - at for (name, at), (_, after) in itertools.pairwise(stamps)}

    def sequential(self, runtime: str, container_id: str) -> dict[str, float]:
        """MB/s of writing one file of 256 MiB, and of reading another that only the host has seen."""
        (self._rootfs(runtime, container_id) / "unread").write_bytes(bytes(_SEQUENTIAL_MIB << 20))
        lines = self.execute(container_id, "sh", "-c", _SEQUENTIAL).splitlines()
        stamps = [(name, float(at)) for name, at in (line.split() for line in lines)]
        self.execute(container_id, "rm", "/written", "/unread")
        return {
            name: (_SEQUENTIAL_MIB << 20) / max(0.01, after - at) / 1e6
            for (name, at), (_, after) in itertools.pairwise(stamps)
        }

    def _rootfs(self, runtime: str, container_id: str) -> Path:
        if runtime == "kata":
            pid = state(container_id)["processes"]["virtiofsd"][0]
            return Path(f"/proc/{pid}/root/{container_id}/rootfs")
        return Path(f"/proc/{self._pids(runtime, container_id)[0]}/root")

    def phases(self) -> dict[str, float]:
        """The shim's own marks of the newest start, in seconds since its process began."""
        found = re.findall(r"started: ((?:[a-z-]+=[0-9.]+ ?)+)", self.containerd.log.read_text())
        return {
            name: float(value)
            for name, value in (pair.split("=") for pair in (found[-1].split() if found else ()))
        }


def state(container_id: str) -> dict[str, dict[str, tuple[int, int]]]:
    """The shim's state record."""
    record: dict[str, dict[str, tuple[int, int]]] = json.loads(
        Path(f"/run/vc/sbs/{container_id}/state.json").read_text()
    )
    return record


def measure(bench: Workbench, runs: int) -> list[Figure]:
    """All figures of this file; runtimes in turn, so that a slow moment hits both."""
    figures: dict[tuple[str, str], Figure] = {}

    def figure(name: str, runtime: str, unit: str, goal: str = "") -> Figure:
        return figures.setdefault((name, runtime), Figure(name, runtime, unit, goal))

    for runtime in RUNTIMES:
        bench.run(runtime, "true")  # the first of each pays for the page cache
    for _ in range(runs):
        for runtime in RUNTIMES:
            figure("ctr run --rm true", runtime, "s", "≤ 2.2").values.append(
                bench.run(runtime, "true")
            )
        for name, seconds in bench.phases().items():
            figure(f"  start: {name}", "kata", "s").values.append(seconds)
    for _ in range(runs):
        for runtime in RUNTIMES:
            figure("stop and remove", runtime, "s", "≤ 0.12").values.append(
                bench.stop_seconds(runtime)
            )
    for runtime in RUNTIMES:
        with bench.container(runtime) as container_id:
            bench.exec_seconds(container_id)
            figure("exec of true", runtime, "s", "≤ 0.20").measure(
                2 * runs, lambda: bench.exec_seconds(container_id)
            )
            figure("stdout, 256 MiB", runtime, "MB/s", "≥ 120").measure(
                max(3, runs // 3), lambda: bench.stdout_rate(container_id)
            )
            for _ in range(max(3, runs // 3)):
                for name, seconds in bench.files(container_id).items():
                    goal = {"create": "≤ 1.6", "list": "≤ 0.3", "unlink": "≤ 0.4"}[name]
                    figure(f"1,000 files: {name}", runtime, "s", goal).values.append(seconds)
                for name, rate in bench.sequential(runtime, container_id).items():
                    goal = {"read": "≥ 310", "write": "≥ 270"}[name]
                    figure(f"sequential {name}", runtime, "MB/s", goal).values.append(rate)
    return list(figures.values())


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
