# SPDX-License-Identifier: Apache-2.0
"""`crictl` as a kubelet would use it, for a containerd that runs.

::

    client = Crictl(containerd, directory)
    pod = client.run_pod()
    container = client.start_container(pod, "sleep", "1000")
    print(client.execute(container, "ip", "address"))
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.lib.containerd import Containerd
from integration.lib.go_tools import crictl
from integration.lib.images import BUSYBOX_REFERENCE
from integration.lib.leftovers import left_by

_READY_LIMIT = 30.0
_OF_CONTAINER = 1  # NamespaceMode CONTAINER: what a kubelet asks for unless told otherwise
_GONE_LIMIT = 5.0
_LOG_LINE = 300  # characters shown of each

_numbers = itertools.count(1)


class CrictlError(Exception):
    """`crictl` failed; the message has its stderr and containerd's last lines."""


class Crictl:
    """Pods of one containerd, and what they leave behind.

    Args:
        directory: for the files that `crictl` is given, and for logs.
        state: containerd's state directory, which has the pods' network namespaces.
        launcher: put before each command, to run it in containerd's network.

    Attributes:
        mark: is in the names of all pods here, and in no other.
    """

    def __init__(
        self,
        containerd: Containerd,
        directory: Path,
        state: Path,
        launcher: Sequence[str] = (),
    ) -> None:
        self.mark = f"n{os.getpid()}-{next(_numbers)}-"
        self.containerd = containerd
        self.directory = directory
        self._state = state
        self._launcher = list(launcher)
        self._crictl = crictl()
        self._pods: dict[str, Path] = {}  # id → file of its PodSandboxConfig

    # --- pods and containers ------------------------------------------------------------

    def run_pod(self, *, handler: str = "kata", **more: Any) -> str:
        """`crictl runp`; `more` are fields of PodSandboxConfig.  Returns the pod's id."""
        name = f"{self.mark}{next(_numbers)}"
        config = {
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 1},
            "log_directory": str(self._directory_of(name)),
            "linux": {"security_context": {"namespace_options": {"pid": _OF_CONTAINER}}},
            **more,
        }
        path = self._write(name, config)
        pod_id = self.crictl("runp", "-r", handler, str(path)).strip()
        self._pods[pod_id] = path
        return pod_id

    def create_container(self, pod_id: str, *command: str, **more: Any) -> str:
        """`crictl create`; `more` are fields of ContainerConfig.  Returns the id."""
        name = f"c{next(_numbers)}"
        config = {
            "metadata": {"name": name, "attempt": 1},
            "image": {"image": BUSYBOX_REFERENCE},
            "command": list(command),
            "log_path": f"{name}.log",
            "linux": {"security_context": {"namespace_options": {"pid": _OF_CONTAINER}}},
            **more,
        }
        path = self._write(name, config)
        return self.crictl("create", pod_id, str(path), str(self._pods[pod_id])).strip()

    def start_container(self, pod_id: str, *command: str, **more: Any) -> str:
        """Create and start a container; returns its id."""
        container_id = self.create_container(pod_id, *command, **more)
        self.crictl("start", container_id)
        return container_id

    def execute(self, container_id: str, *command: str, timeout: float = 60) -> str:
        """What a command in the container prints.

        Raises:
            CrictlError: it failed.
        """
        return self.crictl("exec", container_id, *command, timeout=timeout)

    @contextlib.contextmanager
    def port_forward(self, pod_id: str, port: int) -> Iterator[int]:
        """`crictl port-forward`; gives the port on the host network's loopback."""
        command = [*self.crictl_command(), "port-forward", pod_id, f":{port}"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                match = re.search(r"127\.0\.0\.1:(\d+)", line)
                assert match, f"crictl port-forward says {line!r}"
                yield int(match[1])
            finally:
                process.kill()

    def logs(self, container_id: str) -> str:
        """What the container wrote to either stream, as `crictl logs` shows it."""
        return self.crictl("logs", container_id, both=True)

    def inspect_pod(self, pod_id: str) -> dict[str, Any]:
        """`crictl inspectp`."""
        found: dict[str, Any] = json.loads(self.crictl("inspectp", pod_id))
        return found

    def inspect(self, container_id: str) -> dict[str, Any]:
        """`crictl inspect`."""
        found: dict[str, Any] = json.loads(self.crictl("inspect", container_id))
        return found

    def address(self, pod_id: str) -> str:
        """The pod's first IP address, as CNI gave it."""
        return str(self.inspect_pod(pod_id)["status"]["network"]["ip"])

    def netns(self, pod_id: str) -> Path:
        """The pod's network namespace on the host."""
        info = self.inspect_pod(pod_id)["info"]
        for namespace in (info.get("runtimeSpec") or {"linux": {}})["linux"].get("namespaces", ()):
            if namespace["type"] == "network":
                return Path(namespace["path"])
        # With the Sandbox API no answer of CRI has it; the shim's record does.
        record = json.loads(Path("/run/vc/sbs", pod_id, "state.json").read_text())
        return Path(record["netns"][0])

    def remove_pod(self, pod_id: str) -> None:
        """`crictl stopp` and `rmp`."""
        self.crictl("stopp", pod_id)
        self.crictl("rmp", pod_id)

    def clean(self) -> dict[str, list[str]]:
        """Remove all pods; returns what those made since the last time have left behind."""
        self.remove_pods()
        deadline = time.monotonic() + _GONE_LIMIT
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)  # a socket of another's sandbox is dead for a moment as well
        self._pods.clear()
        return left

    def _left(self) -> dict[str, list[str]]:
        left: dict[str, list[str]] = {}
        for name in self._pods:
            for kind, found in left_by(name).items():
                left.setdefault(kind, []).extend(found)
        if names := [p.name for p in self.namespaces()]:
            left["network namespaces"] = names
        if links := self.pod_links():
            left["links"] = links
        return left

    def namespaces(self) -> list[Path]:
        """Network namespaces of pods that exist now."""
        return sorted(self._state.glob("io.containerd.*/netns/cni-*"))

    def pod_links(self) -> list[str]:
        """Links of containerd's network that belong to pods."""
        command = [*self._launcher, "ip", "-json", "link"]
        links = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return [link["ifname"] for link in links if link["ifname"].startswith(("veth", "tap"))]

    # --- crictl -------------------------------------------------------------------------

    def crictl_command(self) -> list[str]:
        """The start of every `crictl` command line for this containerd."""
        endpoint = f"unix://{self.containerd.address}"
        return [
            *self._launcher,
            *(str(self._crictl), "-c", str(self._settings), "-t", "60s"),
            *("-r", endpoint, "-i", endpoint),
        ]

    def crictl(self, *args: str, timeout: float = 120, both: bool = False) -> str:
        """Run `crictl`; returns its stdout, or `both` stdout and stderr."""
        done = subprocess.run(
            [*self.crictl_command(), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise CrictlError(
                f"crictl {' '.join(args)} ended with {done.returncode}:\n"
                f"{(done.stderr or done.stdout).decode(errors='replace')}\n"
                f"containerd's last lines:\n{self._last_log_lines()}"
            )
        return done.stdout.decode(errors="replace")

    # --- inside -------------------------------------------------------------------------

    @property
    def _settings(self) -> Path:
        path = self.directory / "crictl.yaml"
        if not path.exists():
            path.write_text("")  # none of the user's own is read
        return path

    def _directory_of(self, name: str) -> Path:
        path = self.directory / "pods" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, name: str, config: Mapping[str, Any]) -> Path:
        path = self.directory / "pods" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
        return path

    def wait_ready(self) -> None:
        """Until runtime and network say that they are."""
        deadline = time.monotonic() + _READY_LIMIT
        while True:
            with contextlib.suppress(CrictlError):
                conditions = json.loads(self.crictl("info"))["status"]["conditions"]
                if all(c["status"] for c in conditions if c["type"].endswith("Ready")):
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"CRI is not ready:\n{self.containerd.last_log_lines()}")
            time.sleep(0.1)  # nothing tells when it is

    def _last_log_lines(self) -> str:
        """Without the specs, which fill pages."""
        lines = self.containerd.last_log_lines(30).splitlines()
        return "\n".join(line[:_LOG_LINE] for line in lines)

    def remove_pods(self) -> None:
        """Remove all that there are, by force."""
        for pod_id in self.crictl("pods", "-q").split():
            with contextlib.suppress(CrictlError):
                self.crictl("rmp", "-f", pod_id)
