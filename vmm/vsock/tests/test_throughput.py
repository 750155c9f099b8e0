# SPDX-License-Identifier: Apache-2.0
"""A gigabyte through one stream, with the model of a guest in a process of its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vmm.vsock import VhostUserChannel
from vmm.vsock.tests import guest_model

ROOT = Path(__file__).resolve().parents[3]


@asynccontextmanager
async def other_process(tmp_path: Path) -> AsyncIterator[VhostUserChannel]:
    path = tmp_path / "vsock.sock"
    async with VhostUserChannel(path) as channel:
        model = subprocess.Popen([sys.executable, "-m", guest_model.__name__, path], cwd=ROOT)
        try:
            yield channel
        finally:
            model.kill()
            model.wait()


@pytest.mark.slow
async def test_a_gigabyte_arrives_whole(tmp_path: Path) -> None:
    size = 1 << 30
    expected = hashlib.sha256()
    for _ in range(size // len(guest_model.BLOCK)):
        expected.update(guest_model.BLOCK)
    async with other_process(tmp_path) as channel:
        with trio.fail_after(120):
            async with await channel.connect_when_ready(1002, 10) as connection:
                await connection.stream.send_all(b"%d\n" % size)
                digest, received = hashlib.sha256(), 0
                while data := await connection.stream.receive_some(256 << 10):
                    digest.update(data)
                    received += len(data)
    assert received == size
    assert digest.digest() == expected.digest()


@pytest.mark.slow
async def test_as_much_to_the_guest(tmp_path: Path) -> None:
    block = hashlib.sha512(b"to the guest").digest() * 1024
    digest = hashlib.sha256()
    async with other_process(tmp_path) as channel:
        with trio.fail_after(120):
            async with await channel.connect_when_ready(1001, 10) as connection:
                for _ in range((256 << 20) // len(block)):
                    await connection.stream.send_all(block)
                    digest.update(block)
                await connection.stream.send_eof()
                assert await connection.stream.receive_some(64) == digest.digest()
