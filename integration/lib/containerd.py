# SPDX-License-Identifier: Apache-2.0
"""A containerd of one's own: own root, state, socket and namespaces, gone without a trace.

::

    with Containerd(edition=DEBIAN, shim_path=prefix / "bin") as containerd:
        containerd.import_image(busybox_image())
        print(containerd.ctr("run", "--rm", ...).stdout)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

RUNTIME = "io.containerd.kata.v2"
_START_LIMIT = 30.0
_STOP_LIMIT = 20.0


@dataclass(frozen=True)
class Edition:
    """Which containerd: the directory of its programs, and what to call it."""

    name: str
    bin_dir: Path

    @property
    def containerd(self) -> Path:
        return self.bin_dir / "containerd"

    @property
    def ctr(self) -> Path:
        return self.bin_dir / "ctr"


DEBIAN = Edition("debian", Path("/usr/bin"))


class CtrError(Exception):
    """`ctr` failed; the message has its stderr and containerd's last lines."""


class Containerd:
    """One daemon, as a context manager.

    Args:
        edition: which build to run.
        shim_path: directories put before PATH, where the shim is.
        environment: further variables of the daemon, which its shims inherit.
        extra_config: TOML appended to the configuration; an attribute too, read by `start`.
        directory: where everything lies; by default a new directory below /run.
        cri: whether the CRI plugin runs.
        launcher: put before the daemon's command, to start it elsewhere.
    """

    def __init__(
        self,
        edition: Edition = DEBIAN,
        *,
        shim_path: Sequence[Path] = (),
        environment: dict[str, str] | None = None,
        extra_config: str = "",
        directory: Path | None = None,
        cri: bool = False,
        launcher: Sequence[str] = (),
    ) -> None:
        self.edition = edition
        self._own_directory = directory is None
        # A unix socket's path ends at 107 bytes, so it must be short.
        self.directory = directory or Path(tempfile.mkdtemp(prefix="pykata-", dir="/run"))
        self.address = self.directory / "c.sock"
        self._environment = environment or {}
        self._path = ":".join([*map(str, shim_path), str(edition.bin_dir), os.environ["PATH"]])
        self.extra_config = extra_config
        self._cri = cri
        self._launcher = list(launcher)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """containerd's own log, with what the shims wrote."""
        return self.directory / "containerd.log"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the daemon, unless it runs, and wait until it serves."""
        if self._process is not None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.toml"
        config.write_text(self._config())
        environment = {**os.environ, **self._environment, "PATH": self._path}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._launcher,
                    self.edition.containerd,
                    "--config",
                    config,
                    "--log-level",
                    "debug",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._wait_serving()

    def stop(self, *, kill: bool = False) -> None:
        """End the daemon; its shims live on."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """Remove what is left in every namespace, end the daemon, remove its directory."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(CtrError, subprocess.TimeoutExpired):
                for namespace in self.ctr("namespaces", "list", "-q").stdout.split():
                    self.remove_all(namespace)
        self.stop()
        for mount in reversed(_mounts_below(self.directory)):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def remove_all(self, namespace: str) -> None:
        """Kill and remove every task and container of a namespace."""
        for task in self.ctr("task", "list", "-q", namespace=namespace).stdout.split():
            self.ctr("task", "rm", "-f", task, namespace=namespace, check=False)
        for container in self.ctr("container", "list", "-q", namespace=namespace).stdout.split():
            self.ctr("container", "rm", container, namespace=namespace, check=False)

    def ctr(
        self,
        *args: str | Path,
        namespace: str = "default",
        check: bool = True,
        timeout: float = 120,
        input: bytes | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `ctr`; stdin is empty unless `input` is given."""
        done = subprocess.run(
            [*self.ctr_command(namespace=namespace), *map(str, args)],
            input=input if input is not None else b"",
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        result = subprocess.CompletedProcess(
            done.args,
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        if check and done.returncode:
            raise CtrError(
                f"ctr {' '.join(map(str, args))} ended with {done.returncode}:\n"
                f"{result.stderr}\ncontainerd's last lines:\n{self.last_log_lines()}"
            )
        return result

    def ctr_command(self, *, namespace: str = "default") -> list[str]:
        """The start of every `ctr` command line for this daemon."""
        return [str(self.edition.ctr), "-a", str(self.address), "-n", namespace]

    def import_image(self, archive: Path, *, namespace: str = "default") -> None:
        """Import an OCI archive and unpack it."""
        self.ctr("images", "import", archive, namespace=namespace)

    def last_log_lines(self, count: int = 30) -> str:
        """For error messages."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def _config(self) -> str:
        # Version 2 is read by containerd 1.6 to 2.x.
        disabled = ["io.containerd.internal.v1.opt"]
        if not self._cri:
            disabled.append("io.containerd.grpc.v1.cri")
        return f"""\
version = 2
root = "{self.directory}/root"
state = "{self.directory}/state"
disabled_plugins = {json.dumps(disabled)}
[grpc]
  address = "{self.address}"
[ttrpc]
  address = "{self.address}.ttrpc"
{self.extra_config}
"""

    def _wait_serving(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_LIMIT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self.address))
                return
            time.sleep(0.02)  # nothing tells when a daemon listens
        raise RuntimeError(f"containerd does not serve:\n{self.last_log_lines()}")


def _mounts_below(directory: Path) -> list[str]:
    prefix = f"{directory}/"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split(" ")[4]).startswith(prefix)]
