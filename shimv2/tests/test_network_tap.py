# SPDX-License-Identifier: Apache-2.0
"""vhost-net where it can be used, and nothing instead where it can't."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from shimv2.network.tap import open_vhost_net


def open_descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_one_for_each_queue(tmp_path: Path) -> None:
    device = tmp_path / "vhost-net"
    device.touch()
    found = open_vhost_net(3, device)
    assert len(set(found)) == 3
    assert not any(os.get_inheritable(fd) for fd in found)
    for fd in found:
        os.close(fd)


def test_a_host_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_vhost_net(2, tmp_path / "vhost-net") == []
    assert not caplog.records


def test_a_device_that_does_not_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A node without its module answers as a FIFO or socket does: ENXIO."""
    device = tmp_path / "vhost-net"
    before = open_descriptors()
    with socket.socket(socket.AF_UNIX) as node, caplog.at_level(logging.WARNING):
        node.bind(str(device))
        assert open_vhost_net(2, device) == []
    assert open_descriptors() == before
    assert "No such device or address" in caplog.text
