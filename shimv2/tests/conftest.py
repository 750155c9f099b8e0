# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of this room."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shimv2.boot import history

Isolated = Callable[[Callable[[], None]], None]


@pytest.fixture(autouse=True)
def own_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts that a test only plays are not kept among the host's."""
    monkeypatch.setattr(history, "HISTORY", tmp_path / "boot")


@pytest.fixture
def isolated() -> Isolated:
    """Run a function in a child process with a mount namespace as the shim's is.

    Its assertions fail the test; its mounts end with it.
    """
    if os.geteuid() != 0:
        pytest.skip("needs root")
    from shimv2.namespaces import enter_own_mount_namespace

    def run(body: Callable[[], None]) -> None:
        report, report_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(report)
                enter_own_mount_namespace()
                body()
                status = 0
            except BaseException:
                os.write(report_write, traceback.format_exc().encode()[-60000:])
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(report_write)
        with open(report, "rb") as file:
            text = file.read().decode()
        _, status = os.waitpid(pid, 0)
        assert status == 0, text

    return run


@pytest.fixture
def nothing_left_open() -> Iterator[None]:
    """No descriptor that a test opened outlives it."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = set(os.listdir("/proc/self/fd")) - before
    assert len(left) <= 1, left
