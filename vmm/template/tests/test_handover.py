# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from vmm.template.handover import HandoverError, receive, send, status, take

Handler = Callable[[Any], Awaitable[None]]


async def serve_one(path: Path, handler: Handler, *, task_status: Any) -> None:
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        task_status.started()
        peer, _ = await listener.accept()
        with peer:
            await handler(peer)


async def test_a_vm_and_its_descriptors_arrive(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()

    async def give(peer: Any) -> None:
        request, descriptors = await receive(peer)
        assert (request["action"], request["key"], request["id"]) == ("take", "k", "box")
        assert descriptors == ()
        await send(peer, {"facts": {"pid": 5}, "pids": [5, 6]}, (write_end,))
        os.close(write_end)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_one, tmp_path / "s", give)
        handover = await take(str(tmp_path / "s"), "k", "box")
    assert handover.pids == (5, 6)
    os.write(handover.descriptors[0], b"alive")
    os.close(handover.descriptors[0])
    assert os.read(read_end, 10) == b"alive"
    assert os.read(read_end, 10) == b"", "no other copy is left"
    os.close(read_end)


async def test_no_cache_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(HandoverError, match="no VM cache at"):
        await take(str(tmp_path / "s"), "k", "box")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed"),
        (b"{", "no JSON"),
        (b"[" * 50_000, "no JSON"),
        (b"[]", "version 1"),
        (b'{"protocol": 2}', "version 1"),
        (b'{"protocol": 1, "error": "none is ready"}', "none is ready"),
        (b'{"protocol": 1}', "facts"),
        (b'{"protocol": 1, "facts": {}, "pids": ["x"]}', "invalid literal"),
    ],
)
async def test_a_bad_answer_costs_an_error_and_no_descriptor(
    tmp_path: Path, answer: bytes, message: str
) -> None:
    read_end, write_end = os.pipe()

    async def give(peer: Any) -> None:
        await receive(peer)
        if answer:
            socket.send_fds(peer._sock, [answer], [write_end])
        os.close(write_end)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_one, tmp_path / "s", give)
        with pytest.raises(HandoverError, match=message):
            await take(str(tmp_path / "s"), "k", "box")
    assert os.read(read_end, 1) == b"", "what came along is closed"
    os.close(read_end)


async def test_status_is_an_object(tmp_path: Path) -> None:
    async def tell(peer: Any) -> None:
        assert (await receive(peer))[0]["action"] == "status"
        await send(peer, {"pid": 7, "machines": []})

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_one, tmp_path / "s", tell)
        assert (await status(str(tmp_path / "s")))["pid"] == 7
