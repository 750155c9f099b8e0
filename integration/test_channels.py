# SPDX-License-Identifier: Apache-2.0
"""The way to the agent that is no vsock; the others are what every test goes through."""

from __future__ import annotations

import os
from pathlib import Path

from integration.lib.configuration import Configuration
from integration.lib.kata import Kata


def test_a_container_through_virtio_serial(kata: Kata, prefix: Path, tmp_path: Path) -> None:
    configuration = Configuration(prefix, tmp_path)
    configuration.set("hypervisor.qemu", vsock="serial")
    container_id = kata.start("sleep", "1000", flags=configuration.flags)
    done = kata.execute(container_id, "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.stdout, done.returncode) == ("out\n", 7)
    assert "err" in done.stderr
    data = os.urandom(1 << 17).hex().encode()
    assert kata.execute(container_id, "cat", input=data).stdout.encode() == data
