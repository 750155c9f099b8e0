# SPDX-License-Identifier: Apache-2.0
"""The lab's channel without a lab: its side of it runs here, on one end of a socket pair."""

from __future__ import annotations

import io
import multiprocessing
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "rootfs-builder"))

from integration.kvmlab import wire
from integration.kvmlab.inside import Server
from integration.kvmlab.machine import Lab, LabError

FRAMES = st.lists(st.tuples(st.integers(wire.HELLO, wire.EXIT), st.binary(max_size=300)))


@given(FRAMES, st.integers(1, 64))
def test_frames_arrive_whole_however_they_are_cut(frames, size):
    data = b"".join(wire.frame(*frame) for frame in frames)
    reader = wire.Reader()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    assert [frame for piece in pieces for frame in reader.receive(piece)] == frames


@pytest.mark.parametrize("header", [(0, 0), (wire.EXIT + 1, 0), (wire.OUTPUT, wire.LIMIT + 1)])
def test_what_is_no_frame(header):
    with pytest.raises(wire.WireError):
        list(wire.Reader().receive(wire.HEADER.pack(*header)))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    ours, theirs = socket.socketpair()
    server = multiprocessing.get_context("fork").Process(
        target=lambda: (ours.close(), Server(theirs.fileno()).serve())
    )
    server.start()
    theirs.close()
    lab = Lab(None, tmp_path, tmp_path)  # type: ignore[arg-type]
    lab.attach(ours)
    yield lab
    server.kill()
    server.join()
    lab.close()


def run(lab: Lab, *argv: str, **more) -> tuple[int, bytes, bytes]:
    output, errors = io.BytesIO(), io.BytesIO()
    status = lab.run([*argv], output=output, errors=errors, **more)
    return status, output.getvalue(), errors.getvalue()


def test_status_output_and_errors(lab):
    assert run(lab, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
    assert run(lab, "sh", "-c", "kill -9 $$")[0] == -9


def test_environment_directory_and_the_end_of_stdin(lab, tmp_path):
    script = "cat; echo $A; pwd"
    answer = run(lab, "sh", "-c", script, environment={"A": "b"}, directory=str(tmp_path))
    assert answer == (0, f"b\n{tmp_path}\n".encode(), b"")


def test_all_output_comes_before_the_exit(lab):
    assert len(run(lab, "head", "-c", "5000000", "/dev/zero")[1]) == 5_000_000


def test_a_descendant_that_holds_the_pipe_holds_nobody_up(lab):
    began = time.monotonic()
    assert run(lab, "sh", "-c", "sleep 20 & echo started") == (0, b"started\n", b"")
    assert time.monotonic() - began < 10


def test_too_long_is_killed(lab):
    assert run(lab, "sleep", "100", limit=0.2)[0] == -9


def test_a_program_that_does_not_exist(lab):
    status, _, errors = run(lab, "/nonesuch")
    assert status == 127
    assert b"/nonesuch" in errors


def test_a_machine_that_ends(lab, tmp_path):
    with pytest.raises(LabError, match="ended"):
        run(lab, "sh", "-c", "kill -9 $PPID; sleep 1")
