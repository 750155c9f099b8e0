# SPDX-License-Identifier: Apache-2.0
"""The device under a real QEMU with a real guest kernel's driver."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vmm.errors import VmmGoneError
from vmm.vsock import VhostUserChannel, VsockConnection, VsockRefused
from vmm.vsock.tests import real_guest
from vmm.vsock.tests.conftest import read_all

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(bool(real_guest.missing()), reason=real_guest.missing()),
]

ECHO, SINK, SOURCE, DIAL, FLOOD = range(1000, 1005)


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_guest.make_initrd(tmp_path_factory.mktemp("initrd"))


@pytest.fixture(scope="module")
def pattern() -> bytes:
    return real_guest.pattern()


@asynccontextmanager
async def booted(
    tmp_path: Path, initrd: Path, *extra: str
) -> AsyncIterator[tuple[VhostUserChannel, subprocess.Popen[bytes]]]:
    path = tmp_path / "vsock.sock"
    async with VhostUserChannel(path) as channel:
        with real_guest.running_guest(path, initrd, extra=extra) as process:
            try:
                await (await channel.connect_when_ready(ECHO, 60)).aclose()
            except VsockRefused:
                process.kill()
                assert process.stdout is not None
                pytest.fail(process.stdout.read().decode(errors="replace")[-2000:])
            yield channel, process


async def test_the_rules_of_streams(tmp_path: Path, initrd: Path, pattern: bytes) -> None:
    async with booted(tmp_path, initrd) as (channel, process):
        # echo, with half-close
        async with await channel.connect(ECHO) as connection:
            data = os.urandom(300_000)
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await connection.stream.send_all(data)
                    await connection.stream.send_eof()

                nursery.start_soon(send)
                with trio.fail_after(20):
                    assert await read_all(connection.stream) == data

        # nobody there
        with trio.fail_after(2), pytest.raises(VsockRefused, match="nobody listens"):
            await channel.connect(9999)

        # the host closes with data still unread in the guest: none of it is lost
        async with await channel.connect(SINK) as connection:
            await connection.stream.send_all(pattern[:500_000])
            await connection.stream.send_eof()
            with trio.fail_after(20):
                assert await read_all(connection.stream) == b"500000 ok\n"

        # the guest connects to the host
        greeted: list[bytes] = []

        async def greet(connection: VsockConnection) -> None:
            greeted.append(await read_all(connection.stream))

        channel.listen(2000, greet)
        for port, answer in ((2000, b"ok\n"), (2001, b"errno 104\n")):
            async with await channel.connect(DIAL) as connection:
                await connection.stream.send_all(b"%d\n" % port)
                with trio.fail_after(10):
                    assert await read_all(connection.stream) == answer
        assert greeted == [b"hello\n"]

        # 200 at once
        done = 0

        async def one(number: int) -> None:
            nonlocal done
            async with await channel.connect(ECHO) as connection:
                data = bytes([number]) * 3000
                await connection.stream.send_all(data)
                await connection.stream.send_eof()
                assert await read_all(connection.stream) == data
            done += 1

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(200):
                    nursery.start_soon(one, number)
        assert done == 200

        # a flood that nobody reads, and one that is read, delay nobody
        async with (
            await channel.connect(FLOOD) as unread,
            await channel.connect(FLOOD) as read,
            await channel.connect(ECHO) as rpc,
        ):
            async with trio.open_nursery() as nursery:

                async def drain() -> None:
                    while await read.stream.receive_some(1 << 18):
                        pass

                nursery.start_soon(drain)
                times = []
                for _ in range(30):
                    start = trio.current_time()
                    await rpc.stream.send_all(b"ping")
                    assert await rpc.stream.receive_some(4) == b"ping"
                    times.append(trio.current_time() - start)
                nursery.cancel_scope.cancel()
            assert sorted(times)[15] < 0.2
            unread.abort()

        # the VM ends
        process.kill()
        with trio.fail_after(2):
            while True:
                try:
                    await channel.connect(ECHO)
                except VmmGoneError:
                    break
                except VsockRefused:
                    await trio.sleep(0.01)


@pytest.mark.slow
async def test_a_gigabyte_each_way(tmp_path: Path, initrd: Path, pattern: bytes) -> None:
    size = 1 << 30
    periods, rest = divmod(size, len(pattern))
    async with booted(tmp_path, initrd) as (channel, _):
        with trio.fail_after(240):
            async with await channel.connect(SOURCE) as connection:
                await connection.stream.send_all(b"%d\n" % size)
                digest = hashlib.sha256()
                while data := await connection.stream.receive_some(256 << 10):
                    digest.update(data)
            expected = hashlib.sha256()
            for _ in range(periods):
                expected.update(pattern)
            expected.update(pattern[:rest])
            assert digest.digest() == expected.digest()

            async with await channel.connect(SINK) as connection:
                for _ in range(periods):
                    await connection.stream.send_all(pattern)
                await connection.stream.send_all(pattern[:rest])
                await connection.stream.send_eof()
                assert await read_all(connection.stream) == b"%d ok\n" % size


async def test_pause_and_memory_hot_plug(tmp_path: Path, initrd: Path) -> None:
    """Connections outlive a stopped VM; more memory than eight regions is followed."""
    monitor = tmp_path / "qmp.sock"
    qmp = f"unix:{monitor},server=on,wait=off"
    async with booted(tmp_path, initrd, "-qmp", qmp) as (channel, _):
        assert channel._backend is not None
        memory = channel._backend.memory
        before = len(memory)
        async with (
            await channel.connect(ECHO) as connection,
            await trio.open_unix_socket(os.fspath(monitor)) as control,
        ):

            async def command(text: bytes) -> None:
                await control.send_all(text)
                answer = b""
                with trio.fail_after(10):
                    while b'"return"' not in answer:
                        answer += await control.receive_some(4096)
                        assert b'"error"' not in answer

            await command(b'{"execute": "qmp_capabilities"}')
            await command(b'{"execute": "stop"}')
            with trio.fail_after(5):
                while channel.driver_up:
                    await trio.sleep(0.005)
            await connection.stream.send_all(b"while it is stopped")
            await command(b'{"execute": "cont"}')
            with trio.fail_after(5):
                assert await connection.stream.receive_some(100) == b"while it is stopped"
            for slot in range(9):
                await command(
                    b'{"execute": "object-add", "arguments": {"qom-type": '
                    b'"memory-backend-memfd", "id": "m%d", "size": 134217728, "share": true}}'
                    % slot
                )
                await command(
                    b'{"execute": "device_add", "arguments": {"driver": "pc-dimm", '
                    b'"id": "d%d", "memdev": "m%d"}}' % (slot, slot)
                )
                await connection.stream.send_all(b"still")
                with trio.fail_after(5):
                    assert await connection.stream.receive_some(100) == b"still"
            assert len(memory) >= before + 8
