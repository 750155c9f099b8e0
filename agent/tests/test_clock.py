# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent import clock
from agent.api import agent_pb2
from ttrpc.errors import Code, RpcError

NOW = 1_700_000_000_000_000_000


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the kernel would have been told, with its clock standing at NOW."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(time, "time_ns", lambda: NOW)
    monkeypatch.setattr(time, "clock_settime_ns", lambda _, value: calls.append(("step", value)))
    monkeypatch.setattr(clock.sys_, "slew_clock", lambda value: calls.append(("slew", value)))
    return calls


@pytest.mark.parametrize(
    ("offset", "call"),
    [
        (1_000_000_001, ("step", NOW + 1_000_000_001)),
        (-86_400_000_000_000, ("step", NOW - 86_400_000_000_000)),
        (1_000_000_000, ("slew", 500_000_000)),
        (-20_000_000, ("slew", -20_000_000)),
        (0, ("slew", 0)),
    ],
)
def test_steps_only_above_a_second(
    kernel: list[tuple[str, int]], offset: int, call: tuple[str, int]
) -> None:
    clock.adjust(NOW + offset)
    assert kernel == [call]


def test_before_the_first_container_it_is_right_at_once(kernel: list[tuple[str, int]]) -> None:
    seconds, rest = divmod(NOW - 400_000_000, 10**9)
    request = agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=rest // 1000)
    clock.set_date_time(request, idle=True)
    assert kernel == [("step", NOW - 400_000_000)]


def test_request(kernel: list[tuple[str, int]]) -> None:
    clock.set_date_time(agent_pb2.SetGuestDateTimeRequest(Sec=NOW // 10**9 + 5, Usec=250_000))
    assert kernel == [("step", NOW + 5_250_000_000)]


@pytest.mark.parametrize(("seconds", "micros"), [(-1, 0), (5, -1), (5, 1_000_000)])
def test_bad_request(kernel: list[tuple[str, int]], seconds: int, micros: int) -> None:
    with pytest.raises(RpcError) as caught:
        clock.set_date_time(agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=micros))
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert kernel == []


def test_no_host_clock(tmp_path: Path) -> None:
    assert clock.host_clock(str(tmp_path)) is None
    directory = tmp_path / "class/ptp/ptp0"
    directory.mkdir(parents=True)
    (directory / "clock_name").write_text("some NIC\n")
    assert clock.host_clock(str(tmp_path)) is None


def test_host_clock_is_found_and_followed(
    tmp_path: Path, kernel: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "class/ptp/ptp1"
    directory.mkdir(parents=True)
    (directory / "clock_name").write_text("KVM virtual PTP\n")
    (tmp_path / "ptp1").touch()
    source = clock.host_clock(str(tmp_path), str(tmp_path))
    assert source is not None
    asked = []

    def gettime(identifier: int) -> int:
        asked.append(identifier)
        return NOW + 3_000_000

    monkeypatch.setattr(time, "clock_gettime_ns", gettime)
    assert source.sync() == "slew"
    assert kernel == [("slew", 3_000_000)]
    assert asked[0] < 0
    assert ~(asked[0] >> 3) == source._descriptor
    source.close()


def test_reseed_refuses_nothing() -> None:
    with pytest.raises(RpcError) as caught:
        clock.reseed(b"")
    assert caught.value.code == Code.INVALID_ARGUMENT
