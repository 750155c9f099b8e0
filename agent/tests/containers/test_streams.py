# SPDX-License-Identifier: Apache-2.0
"""stdio of containers: raw streams and calls, pipes and terminals."""

from __future__ import annotations

import hashlib
import signal
from typing import Any

import pytest
import trio
import trio.testing

from agent.api import agent_pb2 as pb
from ttrpc.errors import Code, RpcError


async def receive_all(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(20):
        while more := await stream.receive_some(65536):
            data += more
    return data


async def receive_until(stream: trio.SocketStream, end: bytes) -> bytes:
    data = b""
    with trio.fail_after(20):
        while not data.endswith(end):
            more = await stream.receive_some(65536)
            assert more, data
            data += more
    return data


async def test_raw_output_is_there_when_the_status_is(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    for number in range(5):
        out, port = await guest.stream()
        async with out:
            await guest.exec("c1", "e1", "sh", "-c", "head -c 60000 /dev/zero", stdout_port=port)
            assert await guest.wait("c1", "e1") == 0
            with trio.fail_after(1):  # it is in the socket already
                received = 0
                while received < 60000:
                    received += len(await out.receive_some(65536))
            assert received == 60000, number


async def test_raw_streams_of_a_container(guest: Any) -> None:
    before = guest.descriptors()
    (out, out_port), (err, err_port), (into, in_port) = [await guest.stream() for _ in range(3)]
    await guest.create(
        "c1", "sh", "-c", "cat; echo done >&2",
        stdin_port=in_port, stdout_port=out_port, stderr_port=err_port,
    )  # fmt: skip
    await guest.start("c1")
    await into.send_all(b"one\n")
    assert await receive_until(out, b"\n") == b"one\n"
    await into.send_all(b"two\n")
    await into.send_eof()  # the end of stdin
    assert await receive_all(out) == b"two\n"
    assert await receive_all(err) == b"done\n"
    assert await guest.wait("c1") == 0
    for stream in (out, err, into):
        await stream.aclose()
    await guest.remove("c1")
    assert guest.descriptors() == before


async def test_much_output_arrives_whole_and_a_slow_reader_is_waited_for(guest: Any) -> None:
    out, port = await guest.stream()
    async with out:
        await guest.run("c1", "dd", "if=/dev/zero", "bs=1M", "count=64", stdout_port=port)
        with pytest.raises(RpcError) as caught:  # it waits for its reader
            await guest.call.WaitProcess(pb.WaitProcessRequest(container_id="c1"), timeout=0.5)
        assert caught.value.code == Code.DEADLINE_EXCEEDED
        digest, count = hashlib.sha256(), 0
        with trio.fail_after(30):
            while data := await out.receive_some(1 << 20):
                digest.update(data)
                count += len(data)
        assert count == 64 << 20
        assert digest.digest() == hashlib.sha256(bytes(64 << 20)).digest()
    assert await guest.wait("c1") == 0


@pytest.mark.parametrize("raw", [True, False])
async def test_a_descendant_that_holds_the_streams(guest: Any, raw: bool) -> None:
    await guest.run("c1", "sleep", "1000")
    out, port = await guest.stream()
    async with out:
        script = "sleep 1000 & echo first; echo $!"
        await guest.exec("c1", "e1", "sh", "-c", script, stdout_port=port if raw else 0)
        with trio.fail_after(3):
            assert await guest.wait("c1", "e1") == 0
            if raw:
                assert (await receive_until(out, b"\n")).startswith(b"first\n")
            else:
                assert (await guest.read("c1", "e1")).startswith(b"first\n")


async def test_what_a_descendant_writes_later_still_comes(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    out, port = await guest.stream()
    async with out:
        script = "(sleep 0.5; echo later) & echo first"
        await guest.exec("c1", "e1", "sh", "-c", script, stdout_port=port)
        assert await guest.wait("c1", "e1") == 0
        assert await receive_all(out) == b"first\nlater\n"


async def test_a_descendant_that_never_stops_writing(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    out, port = await guest.stream()

    async def read() -> None:
        while await out.receive_some(1 << 20):
            pass

    async with out, trio.open_nursery() as nursery:
        nursery.start_soon(read)
        script = "(while :; do echo x; done) & exit 4"
        await guest.exec("c1", "e1", "sh", "-c", script, stdout_port=port)
        with trio.fail_after(3):
            assert await guest.wait("c1", "e1") == 4
        await guest.signal("c1", signal.SIGKILL)
        assert await guest.wait("c1") == 137


async def test_stdin_by_calls(guest: Any) -> None:
    await guest.run("c1", "cat")
    write = guest.call.WriteStdin
    for text in (b"a" * 100_000, b"b"):
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                reply = {}

                async def put(text: bytes = text, reply: dict[str, Any] = reply) -> None:
                    reply["it"] = await write(pb.WriteStreamRequest(container_id="c1", data=text))

                nursery.start_soon(put)
                data = b""
                while len(data) < len(text):
                    request = pb.ReadStreamRequest(container_id="c1", len=32768)
                    data += (await guest.call.ReadStdout(request)).data
            assert data == text
            assert reply["it"].len == len(text)
    await guest.call.CloseStdin(pb.CloseStdinRequest(container_id="c1"), timeout=20)
    assert await guest.read("c1") == b""
    assert await guest.wait("c1") == 0


async def test_an_empty_write_closes_stdin(guest: Any) -> None:
    await guest.run("c1", "cat")
    await guest.call.WriteStdin(pb.WriteStreamRequest(container_id="c1"), timeout=20)
    assert await guest.wait("c1") == 0


async def test_stdout_can_be_opened_again_by_its_user(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    out, port = await guest.stream()
    async with out:
        script = "id -u > /dev/stdout && echo again > /proc/self/fd/1"
        await guest.exec("c1", "e1", "sh", "-c", script, stdout_port=port, uid=1234)
        assert await receive_all(out) == b"1234\nagain\n"
        assert await guest.wait("c1", "e1") == 0


async def test_a_terminal(guest: Any) -> None:
    out, out_port = await guest.stream()
    into, in_port = await guest.stream()
    async with out, into:
        ports = {"stdin_port": in_port, "stdout_port": out_port}
        await guest.create("c1", "sh", terminal=True, **ports)
        resize = pb.TtyWinResizeRequest(container_id="c1", row=33, column=111)
        await guest.call.TtyWinResize(resize, timeout=20)
        await guest.start("c1")
        await into.send_all(b"stty size; exit 6\n")
        assert b"33 111\r\n" in await receive_all(out)
        assert await guest.wait("c1") == 6


async def test_a_terminal_of_an_exec(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    await guest.exec("c1", "e1", "sh", "-c", "tty; id -u", terminal=True, uid=1234)
    assert await guest.read("c1", "e1") == b"/dev/pts/0\r\n1234\r\n"
    assert await guest.wait("c1", "e1") == 0


async def test_no_terminal_to_resize(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    with pytest.raises(RpcError) as caught:
        await guest.call.TtyWinResize(pb.TtyWinResizeRequest(container_id="c1"), timeout=20)
    assert caught.value.code == Code.UNAVAILABLE


async def read_when_free(call: Any, **more: Any) -> bytes:
    """ReadStdout, as soon as the agent has seen that an earlier reader is gone."""
    with trio.fail_after(20):
        while True:
            try:
                request = pb.ReadStreamRequest(container_id="c1", len=9)
                return bytes((await call.ReadStdout(request, **more)).data)
            except RpcError as error:
                if error.code != Code.FAILED_PRECONDITION:
                    raise
                await trio.sleep(0.02)


async def test_a_dead_reader_takes_no_bytes(guest: Any) -> None:
    await guest.run("c1", "cat")
    async with guest.another() as call:
        with pytest.raises(RpcError) as caught:
            await call.ReadStdout(pb.ReadStreamRequest(container_id="c1", len=9), timeout=0.2)
        assert caught.value.code == Code.DEADLINE_EXCEEDED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_when_free, call)
            await trio.testing.wait_all_tasks_blocked(0.3)
            nursery.cancel_scope.cancel()
    write = pb.WriteStreamRequest(container_id="c1", data=b"x")
    await guest.call.WriteStdin(write, timeout=20)
    assert await read_when_free(guest.call, timeout=20) == b"x"


async def test_a_stream_that_never_comes(guest: Any) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.create("c1", "true", stdout_port=1)
    assert caught.value.code == Code.NOT_FOUND
    await guest.create("c1", "true")
