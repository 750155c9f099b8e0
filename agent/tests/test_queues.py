# SPDX-License-Identifier: Apache-2.0
"""The kernel's answers are played; a VM with two queues is in integration/test_resources_cri.py."""

from __future__ import annotations

import ctypes
import errno
import fcntl
from pathlib import Path

import pytest

from agent import queues

_GET, _SET = 0x3C, 0x3D
_COMBINED = 8


@pytest.mark.parametrize(
    ("most", "now", "cpus", "wanted"),
    [(4, 1, 2, 2), (4, 1, 8, 4), (1, 1, 2, None), (4, 4, 2, None), (0, 0, 2, None)],
)
def test_as_many_pairs_as_cpus(
    tmp_path: Path, monkeypatch, most: int, now: int, cpus: int, wanted: int | None
) -> None:
    (tmp_path / "class/net/eth0").mkdir(parents=True)
    asked: list[int] = []

    def ioctl(_fd: int, number: int, request: bytes) -> None:
        assert number == 0x8946
        assert request[:16] == b"eth0".ljust(16, b"\0")
        address = int.from_bytes(request[16:24], "little")
        channels = (ctypes.c_uint32 * 9).from_address(address)
        if channels[0] == _GET:
            channels[4], channels[_COMBINED] = most, now
        else:
            assert channels[0] == _SET
            asked.append(channels[_COMBINED])

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    queues.follow_cpus(cpus, str(tmp_path))
    assert asked == ([] if wanted is None else [wanted])


def test_what_has_no_queues_is_left_alone(tmp_path: Path) -> None:
    """The real kernel says so of lo; and of what is gone meanwhile."""
    for name in ("lo", "gone0"):
        (tmp_path / "class/net" / name).mkdir(parents=True)
    queues.follow_cpus(4, str(tmp_path))


def test_a_refusal_is_no_error(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "class/net/eth0").mkdir(parents=True)

    def ioctl(_fd: int, _number: int, request: bytes) -> None:
        channels = (ctypes.c_uint32 * 9).from_address(int.from_bytes(request[16:24], "little"))
        if channels[0] == _SET:
            raise OSError(errno.EBUSY, "Device or resource busy")
        channels[4], channels[_COMBINED] = 2, 1

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    queues.follow_cpus(2, str(tmp_path))
    assert "eth0" in "".join(capfd.readouterr())
