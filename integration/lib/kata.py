# SPDX-License-Identifier: Apache-2.0
"""Containers of one test: run by `ctr` with our runtime, removed at its end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from integration.lib.containerd import RUNTIME, Containerd
from integration.lib.images import BUSYBOX_REFERENCE

_numbers = itertools.count(1)

Result = subprocess.CompletedProcess[str]


class Kata:
    """Names containers, runs them, and removes what a test left.

    Args:
        namespace: containerd's; one of the test's own keeps others out.
        image: of all containers.

    Attributes:
        mark: is in the id of every container of this test run, and of no other.
    """

    mark = f"t{os.getpid()}-"

    def __init__(
        self,
        containerd: Containerd,
        namespace: str = "default",
        image: str = BUSYBOX_REFERENCE,
    ) -> None:
        self.containerd = containerd
        self._image = image
        self.namespace = namespace
        self._ids: list[str] = []

    def new_id(self) -> str:
        """An id nobody else uses; its container is removed at the end."""
        container_id = f"{self.mark}{next(_numbers)}"
        self._ids.append(container_id)
        return container_id

    def ctr(self, *args: str | Path, check: bool = True, **more: Any) -> Result:
        """Any `ctr` command in this namespace."""
        return self.containerd.ctr(*args, namespace=self.namespace, check=check, **more)

    def run(
        self,
        *command: str,
        flags: tuple[str | Path, ...] = (),
        container_id: str = "",
        check: bool = True,
        timeout: float = 120,
        input: bytes | None = None,
    ) -> Result:
        """`ctr run --rm`: the container is gone when this returns."""
        return self.ctr(
            *("run", "--rm", "--runtime", RUNTIME, *flags, self._image),
            *(container_id or self.new_id(), *command),
            check=check,
            timeout=timeout,
            input=input,
        )

    def start(self, *command: str, flags: tuple[str | Path, ...] = ()) -> str:
        """`ctr run -d`: a container that goes on; returns its id."""
        container_id = self.new_id()
        self.ctr("run", "-d", "--runtime", RUNTIME, *flags, self._image, container_id, *command)
        return container_id

    @contextlib.contextmanager
    def pod(self, flags: tuple[str | Path, ...] = ()) -> Iterator[Pod]:
        """A sandbox with a pause container, as CRI makes one; gone with its members after."""
        pod_id = self.start("sleep", "1", flags=(*_annotations("sandbox", ""), *flags))
        pod = Pod(self, pod_id)
        try:
            yield pod
        finally:
            for member in [*pod.members, pod_id]:
                self.remove(member)

    def execute(
        self, container_id: str, *command: str, flags: tuple[str, ...] = (), **more: Any
    ) -> Result:
        """`ctr task exec` with an exec id of its own."""
        exec_id = f"e{next(_numbers)}"
        return self.ctr(
            "task", "exec", "--exec-id", exec_id, *flags, container_id, *command, **more
        )

    def popen(self, *args: str | Path, **more: Any) -> subprocess.Popen[bytes]:
        """`ctr` in the background."""
        command = [*self.containerd.ctr_command(namespace=self.namespace), *map(str, args)]
        return subprocess.Popen(command, **more)

    def status(self, container_id: str) -> str:
        """RUNNING, STOPPED, …; "" for no task."""
        for line in self.ctr("task", "list").stdout.splitlines()[1:]:
            name, _, status = line.split()
            if name == container_id:
                return status
        return ""

    def delete(self, container_id: str) -> int:
        """`ctr task rm` of a stopped task; returns the exit status that it tells."""
        done = self.ctr("task", "rm", container_id)
        match = re.search(r"non-zero exit code (\d+)", done.stderr)
        return int(match[1]) if match else 0

    def remove(self, container_id: str) -> None:
        """Remove task and container, whatever their state."""
        self.ctr("task", "rm", "-f", container_id, check=False)
        self.ctr("container", "rm", container_id, check=False)

    def record(self, container_id: str) -> dict[str, Any]:
        """The shim's state record: pids of its processes."""
        record: dict[str, Any] = json.loads(
            Path(f"/run/vc/sbs/{container_id}/state.json").read_text()
        )
        return record

    def pid_of(self, container_id: str, name: str) -> int:
        """The pid of "shim", "vmm" or "virtiofsd"."""
        return int(self.record(container_id)["processes"][name][0])

    def close(self) -> None:
        """Remove what is left."""
        tasks = {line.split()[0] for line in self.ctr("task", "list").stdout.splitlines()[1:]}
        containers = set(self.ctr("container", "list", "-q").stdout.split())
        for container_id in self._ids:
            if container_id in tasks:
                self.ctr("task", "rm", "-f", container_id, check=False)
            if container_id in containers:
                self.ctr("container", "rm", container_id, check=False)


class Pod:
    """Containers in one VM.

    Attributes:
        id: of the sandbox and its pause container.
        vmm_pid: as it was at the start.
    """

    def __init__(self, kata: Kata, pod_id: str) -> None:
        self.id = pod_id
        self.members: list[str] = []
        self.vmm_pid = kata.pid_of(pod_id, "vmm")
        self._kata = kata

    def start(self, *command: str, flags: tuple[str | Path, ...] = ()) -> str:
        """A further container; returns its id."""
        annotations = _annotations("container", self.id)
        container_id = self._kata.start(*command, flags=(*annotations, *flags))
        self.members.append(container_id)
        return container_id


def _annotations(kind: str, sandbox_id: str) -> tuple[str, ...]:
    flags: tuple[str, ...] = ("--annotation", f"io.kubernetes.cri.container-type={kind}")
    if sandbox_id:
        flags += ("--annotation", f"io.kubernetes.cri.sandbox-id={sandbox_id}")
    return flags


def parent_of(pid: int) -> int:
    """The pid of a process's parent."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("PPid:")))


def wait_until(condition: Callable[[], Any], limit: float, what: str) -> float:
    """Poll `condition`; returns the seconds it took.

    Raises:
        AssertionError: it did not hold within `limit` seconds, or $PYKATA_SLOWNESS times as many.
    """
    limit *= float(os.environ.get("PYKATA_SLOWNESS", "1"))
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit:
            raise AssertionError(f"not within {limit} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - start


class EventLog:
    """`ctr events` of a daemon, collected in the background."""

    def __init__(self, containerd: Containerd) -> None:
        self._process = subprocess.Popen(
            [*containerd.ctr_command(), "events"], stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)  # extend() would show them only at the end

    def topics(self, container_id: str) -> list[str]:
        """Topics of the task events of one container, in order."""
        return [
            line.split()[5]
            for line in list(self.lines)
            if container_id in line and "/tasks/" in line
        ]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
