# SPDX-License-Identifier: Apache-2.0
"""Keeps the nursery of ready shims running, as long as the task that does so."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import trio

from shimv2.ready.nursery import FILLER

log = logging.getLogger("factory")

_RETRY_AFTER = 10.0  # seconds
_PROGRAM = """\
import sys

sys.path.append({lib!r})
from shimv2.ready.nursery import main

sys.exit(main())
"""


async def keep_ready_shims() -> None:
    """Run until cancelled; shims that were forked live on."""
    program = _PROGRAM.format(lib=str(Path(__file__).parents[2]))
    while True:
        try:
            status = await _run_once([sys.executable, "-IS", "-c", program, FILLER])
        except OSError as error:
            log.warning("no ready shims: %s: %s", sys.executable, error.strerror)
        else:
            log.warning("the process that shims are forked from ended with status %d", status)
        await trio.sleep(_RETRY_AFTER)


async def _run_once(command: list[str]) -> int:
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        return await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()  # which it ends by
            await process.wait()
