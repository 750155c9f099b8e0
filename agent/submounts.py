# SPDX-License-Identifier: Apache-2.0
"""Directories of the share that several containers have, mounted once.

Each directory that the host has bound into the share is a mount of its own in the guest, made by
the kernel when somebody goes there. If that is crun, each container has another one: another
superblock, where a socket or a lock of its neighbour can't be found. So the agent goes there
first, in the namespace that all of theirs are copies of.
"""

from __future__ import annotations

import os

from agent import syscalls as sys_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Submounts:
    """Counts who uses which.

    Args:
        share: where the host's directories are.
    """

    def __init__(self, share: str) -> None:
        self._prefix = f"{share}/"
        self._holders: dict[str, int] = {}

    def hold(self, sources: Iterable[str]) -> list[str]:
        """See that those in the share are mounted; returns them, for `release`."""
        held = []
        for source in sources:
            path = os.path.normpath(source)
            if not path.startswith(self._prefix):
                continue
            if path not in self._holders:
                try:
                    os.stat(f"{path}/")  # without the slash nothing is mounted
                except OSError:  # a file, or not there: for crun to tell
                    continue
            self._holders[path] = self._holders.get(path, 0) + 1
            held.append(path)
        return held

    def release(self, held: Iterable[str]) -> None:
        """Unmount what nobody has any more."""
        for path in held:
            self._holders[path] -= 1
            if self._holders[path]:
                continue
            del self._holders[path]
            try:
                sys_.umount(path, sys_.MNT_DETACH | sys_.UMOUNT_NOFOLLOW)
            except OSError:  # it was part of another mount, or has gone with the host's
                continue
