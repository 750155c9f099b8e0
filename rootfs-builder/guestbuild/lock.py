# SPDX-License-Identifier: Apache-2.0
"""One build of a thing at a time: a second one waits, and then finds the first one's result."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guestbuild.progress import Progress


@contextmanager
def locked(cache: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of a cache entry. It goes with the process, however that ends."""
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"{name}: waiting for another build of the same")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
