# SPDX-License-Identifier: Apache-2.0
"""The debug console, at a port of 127.0.0.1 in place of a vsock one."""

from __future__ import annotations

from typing import Any

import trio


async def test_a_shell_and_its_end(guest: Any) -> None:
    before = guest.descriptors()
    async with await trio.open_tcp_stream("127.0.0.1", guest.console_port) as stream:
        await stream.send_all(b"echo $((6 * 7)); tty; exit\n")
        data = b""
        with trio.fail_after(20):
            while more := await stream.receive_some(4096):
                data += more
            # The client sees the end before the agent is done with it.
            while guest.descriptors() > before:
                await trio.sleep(0.02)
    assert b"42\r\n" in data
    assert b"/dev/pts/" in data


async def test_hanging_up_ends_the_shell(guest: Any) -> None:
    before = guest.descriptors()
    stream = await trio.open_tcp_stream("127.0.0.1", guest.console_port)
    await stream.send_all(b"echo $((6 * 7)); cat\n")
    data = b""
    with trio.fail_after(20):
        while b"42\r\n" not in data:
            data += await stream.receive_some(4096)
        await stream.aclose()
        while guest.descriptors() > before:
            await trio.sleep(0.02)
