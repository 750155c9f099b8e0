# SPDX-License-Identifier: Apache-2.0
"""What tells one file, and one host, from another without reading all of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPU_LINES = ("vendor_id", "cpu family", "model", "stepping", "microcode", "flags", "bugs")


def of_file(path: Path) -> str:
    """Changes whenever the file's content may have: its place, inode, size and times.

    The time of change (ctime) can't be set by who replaces a file, so that a restored mtime
    deceives nobody.
    """
    stat = os.stat(path)
    times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
    return f"{path} {stat.st_dev} {stat.st_ino} {stat.st_size} {times}"


def of_host_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The first processor's model, microcode and features, and the host's kernel."""
    lines = []
    with cpuinfo.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():  # one paragraph a processor: the first is enough
                break
            name, _, value = line.partition(":")
            if name.strip() in _CPU_LINES:
                lines.append(f"{name.strip()}={value.strip()}")
    return " ".join([platform.release(), *lines])
