# SPDX-License-Identifier: Apache-2.0
"""Running other programs, with their last words in the error when they fail."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from guestbuild.errors import BuildError

_LAST_LINES = 15


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
) -> str:
    """Run a program to its end and return what it wrote (stdout and stderr together).

    Args:
        env: Added to this process's environment.
        on_line: Called with each line as it comes.
        log: A file that gets all of the output; named in the error.

    Raises:
        BuildError: The program is missing or failed; with its last lines.
    """
    words = [str(word) for word in argv]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    lines: list[str] = []
    tail: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise BuildError(f"{words[0]}: not installed (see rootfs-builder/deps.py)") from error
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            tail.append(line.rstrip())
            if on_line is not None:
                on_line(line)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(lines))
    if status:
        where = f"\n(all of its output: {log})" if log is not None else ""
        last = "\n  ".join(tail)
        raise BuildError(f"{words[0]} failed with status {status}:\n  {last}{where}")
    return "".join(lines)
