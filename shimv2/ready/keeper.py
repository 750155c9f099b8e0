# SPDX-License-Identifier: Apache-2.0
"""Keeps the nursery of ready shims running, as long as the task that does so."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import trio

from shimv2.ready.hand_over import socket_path
from shimv2.ready.nursery import FILLER, UPDATED

log = logging.getLogger("factory")

_RETRY_AFTER = 10.0  # seconds
_END_LIMIT = 3.0  # seconds for the nursery to end by itself
_PROGRAM = """\
import sys

sys.path.append({lib!r})
from shimv2.ready.likeness import code

found = code()  # before the rest is loaded, which an update may replace meanwhile
from shimv2.ready.nursery import main

sys.exit(main(found))
"""


async def keep_ready_shims() -> None:
    """Run until cancelled; shims that were forked live on."""
    library = str(Path(__file__).parents[2])
    if not socket_path():
        log.warning("no ready shims: the path of this installation is too long: %s", library)
        return
    program = _PROGRAM.format(lib=library)
    status = -1
    while True:
        before = status
        try:
            status = await _run_once([sys.executable, "-IS", "-c", program, FILLER])
        except OSError as error:
            log.warning("no ready shims: %s: %s", sys.executable, error.strerror)
        else:
            if status == UPDATED:
                log.info("the installed files have changed: shims are forked from them now")
                continue
            if status:
                log.warning("the process that shims are forked from ended with status %d", status)
            elif status != before:
                log.warning("another process keeps ready shims of this installation")
        await trio.sleep(_RETRY_AFTER)


async def _run_once(command: list[str]) -> int:
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.PIPE,
        start_new_session=True,  # what a terminal tells us it hears from us
    )
    assert process.stdin is not None
    try:
        return await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()  # which it ends by
            with trio.move_on_after(_END_LIMIT):
                await process.wait()
            process.kill()
            await process.wait()
