# SPDX-License-Identifier: Apache-2.0
"""Stdio with real fifos and files; the guest's end is one half of a socket pair."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from shimv2 import endpoints
from shimv2.stdio import StdioError
from shimv2.tests.stdio_ends import (
    Collector,
    RpcReader,
    SocketReader,
    guest_stream,
    make,
    receive,
    send,
)

pytestmark = pytest.mark.usefixtures("nothing_left_open")


@pytest.fixture
def fifo(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


async def test_output_reaches_each_fifo_and_ends_with_the_stream(fifo) -> None:
    out_path, err_path = fifo("out"), fifo("err")
    out = os.open(out_path, os.O_RDONLY | os.O_NONBLOCK)
    err = os.open(err_path, os.O_RDONLY | os.O_NONBLOCK)
    (guest_out, out_reader), (guest_err, err_reader) = guest_stream(), guest_stream()
    async with make(stdout=str(out_path), stderr=f"fifo://{err_path}") as stdio:
        await stdio.open()
        stdio.start(None, out_reader, err_reader)
        await send(guest_out, b"to out")
        await send(guest_err, b"to err")
        with trio.fail_after(5):
            assert await receive(out, 6) == b"to out"
            assert await receive(err, 6) == b"to err"
        guest_out.close()
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(out)
        assert os.read(out, 1) == b""  # the client sees the end while stderr lives on
    assert os.read(err, 1) == b""
    guest_err.close()
    os.close(out)
    os.close(err)


async def test_a_writer_waits_while_nobody_reads_and_goes_on_when_one_comes(fifo) -> None:
    path = fifo("out")
    guest, reader = guest_stream()
    data = os.urandom(32 << 20)
    async with make(stdout=str(path)) as stdio:
        await stdio.open()
        stdio.start(None, reader, None)
        async with trio.open_nursery() as nursery:
            sent = trio.Event()

            async def writer() -> None:
                await send(guest, data)
                sent.set()

            nursery.start_soon(writer)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not sent.is_set()
            with trio.fail_after(20):
                # One reader takes a little and leaves, the next takes up where it left.
                first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                got = await receive(first, 100_000)
                os.close(first)
                await trio.testing.wait_all_tasks_blocked(0.05)
                second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                got += await receive(second, len(data) - len(got))
                os.close(second)
                await sent.wait()
    guest.close()
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


async def test_drained_means_in_the_fifo_though_the_stream_stays_open(fifo) -> None:
    path = fifo("out")
    out = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    guest, reader = guest_stream()
    async with make(stdout=str(path)) as stdio:
        await stdio.open()
        stdio.start(None, reader, None)
        guest.send(b"last words")
        with trio.fail_after(5):
            await stdio.drained(timeout=4)
        assert os.read(out, 100) == b"last words"
        guest.send(b"a descendant's")
        with trio.fail_after(5):
            assert await receive(out, 14) == b"a descendant's"
    guest.close()
    os.close(out)


async def test_drained_is_bounded_when_nobody_reads(fifo, caplog) -> None:
    path = fifo("out")
    guest, reader = guest_stream()
    async with make(stdout=str(path)) as stdio:
        await stdio.open()
        stdio.start(None, reader, None)
        with trio.move_on_after(0.5):
            await send(guest, bytes(64 << 20))
        with trio.fail_after(5):
            await stdio.drained(timeout=0.1)
    guest.close()
    assert "not taken" in caplog.text


async def test_drained_with_a_reader_without_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    reader = RpcReader()
    async with make(stdout=str(path)) as stdio:
        await stdio.open()
        stdio.start(None, reader, None)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stdio.drained, 4.0)
            await trio.testing.wait_all_tasks_blocked()  # the answers come after the call
            for _ in range(50):
                reader.send.send_nowait(b"0123456789")
        assert path.read_bytes() == b"0123456789" * 50
        reader.send.send_nowait(b"end")
        reader.send.close()
        begin = trio.current_time()
        await stdio.drained(timeout=4)
        assert trio.current_time() - begin < 0.4  # the end is known at once
        assert path.read_bytes().endswith(b"9end")


async def test_both_streams_share_one_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before ")
    (guest_out, out), (guest_err, err) = guest_stream(), guest_stream()
    async with make(stdout=str(path), stderr=str(path)) as stdio:
        await stdio.open()
        stdio.start(None, out, err)
        guest_out.send(b"one ")
        await stdio.drained(timeout=4)
        guest_out.close()
        guest_err.send(b"two")
        await stdio.drained(timeout=4)
        guest_err.close()
    assert path.read_text() == "before one two"


async def test_both_streams_wait_for_room_in_one_fifo(fifo) -> None:
    path = fifo("out")
    (guest_out, out), (guest_err, err) = guest_stream(), guest_stream()
    size = 16 << 20
    async with make(stdout=str(path), stderr=str(path)) as stdio, trio.open_nursery() as nursery:
        await stdio.open()
        stdio.start(None, out, err)
        nursery.start_soon(send, guest_out, bytes(size))
        nursery.start_soon(send, guest_err, bytes(size))
        await trio.testing.wait_all_tasks_blocked(0.05)
        client = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with trio.fail_after(20):
            await receive_and_drop(client, 2 * size, trio.CancelScope())
        os.close(client)
    guest_out.close()
    guest_err.close()


async def test_file_uri_makes_directories_and_takes_stderr_too(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "c" / "log"
    (guest_out, out), (guest_err, err) = guest_stream(), guest_stream()
    uri = f"file://{tmp_path}/a%20b/c/log"
    async with make(stdout=uri, stderr="") as stdio:
        await stdio.open()
        stdio.start(None, out, err)
        guest_out.send(b"out")
        await stdio.drained(timeout=4)
        guest_err.send(b"err")
        await stdio.drained(timeout=4)
    guest_out.close()
    guest_err.close()
    assert path.read_text() == "outerr"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


async def test_a_full_disk_is_warned_of_once_and_never_stops_the_process(caplog) -> None:
    guest, reader = guest_stream()
    async with make(stdout="/dev/full") as stdio:
        await stdio.open()
        stdio.start(None, reader, None)
        with trio.fail_after(10):
            await send(guest, bytes(2 << 20))
            await stdio.drained(timeout=4)
    guest.close()
    lost = [r for r in caplog.records if "is lost" in r.message]
    assert len(lost) == 1
    assert "/dev/full" in lost[0].message


async def test_without_a_sink_output_is_thrown_away() -> None:
    (guest_out, out), (guest_err, err) = guest_stream(), guest_stream()
    async with make() as stdio:
        assert not stdio.wants_stdin
        await stdio.open()
        stdio.start(None, out, err)
        with trio.fail_after(10):
            await send(guest_out, bytes(1 << 20))
            await send(guest_err, bytes(1 << 20))
    guest_out.close()
    guest_err.close()


async def test_an_unknown_scheme_is_a_warning(caplog) -> None:
    guest, reader = guest_stream()
    async with make(stdout="ttrpc+unix:///run/x?streaming_id=1") as stdio:
        await stdio.open()
        stdio.start(None, reader, None)
        with trio.fail_after(10):
            await send(guest, bytes(1 << 20))
    guest.close()
    assert "ttrpc+unix" in caplog.text


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("path", ["/does/not/exist", "/proc/nope", "/"])
async def test_what_cannot_be_opened_is_named(stream: str, path: str) -> None:
    with pytest.raises(StdioError, match=path):
        async with make(**{stream: path}) as stdio:
            await stdio.open()


async def test_stdin_survives_detach_and_ends_with_close_io(fifo) -> None:
    path = fifo("in")
    guest = Collector()
    async with make(stdin=str(path)) as stdio:
        await stdio.open()
        stdio.start(guest, None, None)
        with trio.fail_after(5):
            for word, so_far in ((b"one", b"one"), (b"two", b"onetwo")):
                client = os.open(path, os.O_WRONLY)
                os.write(client, word)
                os.close(client)
                await guest.until(so_far)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not guest.ended.is_set()
            client = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.write(client, b"three")  # still in the fifo, its writer still open
            await stdio.close_stdin()
            await guest.ended.wait()
        assert guest.data == b"onetwothree"
        os.close(client)


async def test_close_io_before_start(fifo) -> None:
    path = fifo("in")
    guest = Collector()
    async with make(stdin=str(path)) as stdio:
        await stdio.open()
        stdio.start(guest, None, None, feed=False)
        client = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # the one way to open it now
        os.write(client, b"early")
        await stdio.close_stdin()
        os.close(client)
        with trio.fail_after(5):
            await guest.ended.wait()
    assert guest.data == b"early"


async def test_a_client_waits_until_stdin_is_fed(fifo) -> None:
    path = fifo("in")
    guest = Collector()
    async with make(stdin=str(path)) as stdio:
        await stdio.open()
        stdio.start(guest, None, None, feed=False)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="No such device or address"):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        stdio.feed()
        client = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(client, b"fed")
        os.close(client)
        with trio.fail_after(5):
            await guest.until(b"fed")
            await stdio.close_stdin()
            await guest.ended.wait()


async def test_stdin_that_was_never_fed_is_closed(fifo) -> None:
    guest = Collector()
    async with make(stdin=str(fifo("in"))) as stdio:
        await stdio.open()
        stdio.start(guest, None, None, feed=False)
    assert guest.ended.is_set()


async def test_stdin_of_a_process_that_does_not_read(fifo) -> None:
    path = fifo("in")
    guest = Collector(refuse=True)
    async with make(stdin=str(path)) as stdio:
        await stdio.open()
        stdio.start(guest, None, None)
        client = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(client, b"x")
        with trio.fail_after(5):
            await guest.ended.wait()
        with pytest.raises(BrokenPipeError):  # the client learns of it
            os.write(client, b"x")
        os.close(client)


async def test_a_guest_that_is_gone_harms_nobody_else(fifo) -> None:
    class Gone(Collector):
        async def aclose(self) -> None:
            await super().aclose()
            raise ConnectionError("no guest")

    class GoneReader(SocketReader):
        async def delivered(self) -> None:
            raise ConnectionError("no guest")

        async def aclose(self) -> None:
            await super().aclose()
            raise ConnectionError("no guest")

    stdin, stdout = fifo("in"), fifo("out")
    out = os.open(stdout, os.O_RDONLY | os.O_NONBLOCK)
    guest, host = socket.socketpair()
    writer = Gone()
    async with make(stdin=str(stdin), stdout=str(stdout)) as stdio:
        await stdio.open()
        stdio.start(writer, GoneReader(host), None)
        guest.send(b"last words")
        with trio.fail_after(5):
            await stdio.drained(timeout=4)
            assert os.read(out, 100) == b"last words"
            await stdio.close_stdin()
            await writer.ended.wait()
            guest.close()
            await trio.lowlevel.wait_readable(out)
    os.close(out)


async def test_stdin_from_a_file_ends_by_itself() -> None:
    guest = Collector()
    async with make(stdin="/dev/null") as stdio:
        await stdio.open()
        stdio.start(guest, None, None)
        with trio.fail_after(5):
            await guest.ended.wait()


async def test_leaving_the_block_frees_a_blocked_pump(fifo) -> None:
    path = fifo("out")
    guest, reader = guest_stream()
    with trio.fail_after(5):
        async with make(stdout=str(path)) as stdio:
            await stdio.open()
            stdio.start(None, reader, None)
            with trio.move_on_after(0.2):
                await send(guest, bytes(64 << 20))
    guest.close()


async def test_a_flood_leaves_room_for_others(fifo) -> None:
    """However fast the bytes come, others get a turn after each mebibyte at the latest."""
    path = fifo("out")
    out = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    guest, reader = guest_stream()
    turns = 0
    async with make(stdout=str(path)) as stdio, trio.open_nursery() as nursery:
        await stdio.open()
        stdio.start(None, reader, None)
        nursery.start_soon(send, guest, bytes(64 << 20))
        nursery.start_soon(receive_and_drop, out, 64 << 20, nursery.cancel_scope)
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1
    guest.close()
    os.close(out)
    assert turns >= 64


async def receive_and_drop(fd: int, size: int, scope: trio.CancelScope) -> None:
    left = size
    while left:
        try:
            left -= len(os.read(fd, 1 << 20))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)
        else:
            await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_the_fifo_is_enlarged(fifo) -> None:
    path = fifo("out")
    sink = endpoints.open_sink(str(path))
    assert fcntl.fcntl(sink.fd, fcntl.F_GETPIPE_SZ) >= 65536
    sink.close()
