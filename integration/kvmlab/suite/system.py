# SPDX-License-Identifier: Apache-2.0
"""The containerd that Debian's unit has started: used, not owned."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from integration.lib.containerd import DEBIAN, Containerd


class SystemContainerd(Containerd):
    """`ctr` for the system's daemon; its log is the journal."""

    def __init__(self, address: Path) -> None:
        super().__init__(DEBIAN, directory=address.parent)
        self.address = address

    def start(self) -> None:
        subprocess.run(["systemctl", "start", "containerd"], check=True)

    def stop(self, *, kill: bool = False) -> None:
        how = ["kill", "--signal=KILL"] if kill else ["stop"]
        subprocess.run(["systemctl", *how, "containerd"], check=True)

    def restart(self) -> None:
        """With what its configuration says now."""
        subprocess.run(["systemctl", "restart", "containerd"], check=True)

    def last_log_lines(self, count: int = 30) -> str:
        command = ["journalctl", "-u", "containerd", "-n", str(count), "--no-pager", "-o", "cat"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


VHOST_VSOCK = "/dev/vhost-vsock"
CONFIGURATION = Path("/usr/local/share/defaults/kata-containers/configuration.toml")


def command_line(pid: int) -> list[str]:
    """A process's arguments."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def descriptors(pid: int) -> set[str]:
    """What a process has open."""
    return {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}


def modules() -> dict[str, int]:
    """Loaded kernel modules and how many users each has."""
    lines = Path("/proc/modules").read_text().splitlines()
    return {line.split()[0]: int(line.split()[2]) for line in lines}


def kata_configuration(change: str) -> Path:
    """The lab's configuration with a drop-in after it."""
    directory = Path(tempfile.mkdtemp(prefix="pykata-", dir="/run"))
    copy = directory / "configuration.toml"
    shutil.copytree(CONFIGURATION.parent, directory, dirs_exist_ok=True)
    (directory / "config.d/change.toml").write_text(change)
    return copy
