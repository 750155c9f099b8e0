# SPDX-License-Identifier: Apache-2.0
"""Who may connect, and what an idle listener costs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from shimv2.management import listener
from shimv2.state import MANAGEMENT_SOCKET as SOCKET

REQUEST = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(listener, "management_socket", lambda _: tmp_path / SOCKET)
    return SimpleNamespace(id="one", settings=SimpleNamespace(bundle=str(tmp_path)))


async def _said(path: Path) -> bytes:
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        said = b""
        try:
            await stream.send_all(REQUEST)
            while more := await stream.receive_some():
                said += more
        except trio.BrokenResourceError:
            pass
    return said


async def test_root_is_answered_and_the_address_is_written_down(
    sandbox: Any, tmp_path: Path
) -> None:
    path = tmp_path / SOCKET
    path.touch()  # left by a shim before
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, sandbox)
        await trio.testing.wait_all_tasks_blocked()
        assert (tmp_path / "monitor_address").read_text() == f"unix://{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"404" in await _said(path)
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_another_user_is_not(sandbox: Any, tmp_path: Path) -> None:
    path = tmp_path / SOCKET
    code = f"""if 1:
        import os, socket
        os.chdir({str(tmp_path)!r})
        os.setuid(65534)
        client = socket.socket(socket.AF_UNIX)
        client.connect({SOCKET!r})
        client.settimeout(10)
        try:
            client.sendall({REQUEST!r})
            print(client.recv(100))
        except ConnectionError:
            print(b"")
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, sandbox)
        await trio.testing.wait_all_tasks_blocked()
        tmp_path.chmod(0o711)
        path.chmod(0o666)  # so that it is the credentials that count
        done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
        nursery.cancel_scope.cancel()
    assert done.stdout == b"b''\n"


async def test_a_place_that_can_not_be_used_ends_nothing(sandbox: Any, tmp_path: Path) -> None:
    (tmp_path / SOCKET).mkdir()
    with trio.fail_after(5):
        await listener.serve(sandbox)


def test_an_idle_listener_has_imported_no_http() -> None:
    code = "import sys, shimv2.daemon; print([n for n in ('h11', 'shimv2.management.routes') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
