# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from agent import serial


@pytest.fixture
def ports(tmp_path, monkeypatch):
    monkeypatch.setattr(serial, "_PORTS", str(tmp_path / "none"))
    monkeypatch.setattr(serial, "_SYSFS", str(tmp_path))
    for port, name in (("vport3p0", ""), ("vport3p1", "other"), ("vport3p2", "agent.channel.0")):
        (tmp_path / port).mkdir()
        if name:  # a console's port has no such file
            (tmp_path / port / "name").write_text(f"{name}\n")


def test_a_port_is_found_beside_consoles(ports):
    assert serial.find_port("agent.channel.0") == "/dev/vport3p2"


def test_no_such_port(ports):
    with pytest.raises(FileNotFoundError, match="no virtio-serial port is called 'none'"):
        serial.find_port("none")
