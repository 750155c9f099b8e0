# SPDX-License-Identifier: Apache-2.0
"""kata-vm-cache as the service that docs/templates.md has a unit for, under KVM."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.kvmlab.suite.system import command_line, kata_configuration
from integration.lib.kata import Kata, parent_of, wait_until

_PAGE = Path(__file__).resolve().parents[3] / "docs/templates.md"
_UNIT = Path("/run/systemd/system/kata-vm-cache.service")
_PROGRAM = "/usr/local/bin/kata-vm-cache"
_READY_WITHIN = 300  # seconds for a template and a VM of it
_CHANGE = """\
[factory]
enable_template = true
vm_cache_number = 1
vm_cache_endpoint = "/run/pykata-cache.sock"
"""


@pytest.fixture(scope="module")
def configuration() -> Iterator[Path]:
    """Of a service that has a VM ready."""
    file = kata_configuration(_CHANGE)
    page = _PAGE.read_text()
    (unit,) = re.findall(r"```\n(\[Unit\]\n.*?)```", page, re.DOTALL)
    assert f"ExecStart={_PROGRAM}\n" in unit
    _UNIT.write_text(unit.replace(_PROGRAM, f"{_PROGRAM} --config {file}"))
    _systemctl("daemon-reload")
    try:
        _systemctl("start", _UNIT.name)
        yield file
    finally:
        _systemctl("stop", _UNIT.name)
        _UNIT.unlink()
        _systemctl("daemon-reload")
        subprocess.run(["kata-runtime", "--config", file, "factory", "destroy"], check=True)


def test_a_service_hands_over_vms_and_shims(kata: Kata, configuration: Path) -> None:
    wait_until(lambda: bool(_cached(configuration)), _READY_WITHIN, "a VM is ready")
    (vmm,) = _cached(configuration)
    flags = ("--runtime-config-path", str(configuration))
    container = kata.start("sleep", "1000", flags=flags)
    assert kata.pid_of(container, "vmm") == vmm
    words = command_line(vmm)
    assert words[words.index("-accel") + 1] == "kvm"
    shim = kata.pid_of(container, "shim")
    nursery = parent_of(shim)
    assert any("shimv2.ready" in word for word in command_line(nursery))
    assert _UNIT.stem not in Path(f"/proc/{shim}/cgroup").read_text()
    _systemctl("stop", _UNIT.name)
    assert not Path(f"/proc/{nursery}").exists()
    assert kata.execute(container, "echo", "hello").stdout == "hello\n"
    another = kata.start("sleep", "1000", flags=flags)
    forked = kata.pid_of(another, "shim")
    assert not any("shimv2.ready" in word for word in command_line(parent_of(forked)))
    assert kata.execute(another, "echo", "hello").stdout == "hello\n"
    # What `start` forks itself is the measure of what it was given.
    for name in ("limits", "oom_score_adj", "attr/current"):
        assert _read(shim, name) == _read(forked, name), name
    assert _read(shim, "cgroup").replace(container, another) == _read(forked, "cgroup")


def _cached(configuration: Path) -> list[int]:
    command: list[str | Path] = ["kata-runtime", "--config", configuration, "factory", "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(x.split()[2]) for x in done.stdout.splitlines() if x.startswith("cached VM ")]


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def _systemctl(*words: str) -> None:
    subprocess.run(["systemctl", *words], check=True)
