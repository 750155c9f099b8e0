# SPDX-License-Identifier: Apache-2.0
"""The way to the agent that is no vsock; the others are what every test goes through."""

from __future__ import annotations

import os
from pathlib import Path

from integration.lib.kata import Kata


def test_a_container_through_virtio_serial(kata: Kata, prefix: Path, tmp_path: Path) -> None:
    installed = prefix / "share/defaults/kata-containers/configuration.toml"
    configuration = tmp_path / "configuration.toml"
    configuration.write_text(installed.read_text())
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d/serial.toml").write_text('[hypervisor.qemu]\nvsock = "serial"\n')
    container_id = kata.start("sleep", "1000", flags=("--runtime-config-path", configuration))
    done = kata.execute(container_id, "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.stdout, done.returncode) == ("out\n", 7)
    assert "err" in done.stderr
    data = os.urandom(1 << 17).hex().encode()
    assert kata.execute(container_id, "cat", input=data).stdout.encode() == data
