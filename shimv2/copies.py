# SPDX-License-Identifier: Apache-2.0
"""Files for a guest with which nothing is shared (``shared_fs = "none"``).

Bind mounts are copied into the guest before their container is created, as Kata does it: what
either side writes later is not seen by the other.  Root file systems have to be disks.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from agent.api import agent_pb2
from shimv2.share import GUEST_DIR, ShareError, shared_name

log = logging.getLogger("container")

Call = Callable[[str, Any], Awaitable[Any]]

_PIECE = 1 << 20  # bytes of a file in one call, as Kata's shim sends
_MOST_BYTES = 64 << 20
_MOST_ENTRIES = 4096


class Copies:
    """In place of a `Share`, for one container."""

    def __init__(self) -> None:
        self._wanted: list[tuple[Path, Path]] = []
        self._entries = self._bytes = 0

    def add_rootfs(self, container_id: str, rootfs: Path) -> Path:
        """Raises:
        ShareError: always.
        """
        raise ShareError(
            f'root file system {rootfs} of {container_id} is no disk, and with shared_fs = "none"'
            " no other reaches the guest"
        )

    def add_mount(
        self,
        container_id: str,
        source: str,
        destination: str,
        *,
        readonly: bool = False,
        follow: bool = False,
    ) -> Path:
        """Note what is to be copied; see `Share.add_mount`.

        Returns:
            Where the guest will find it.

        Raises:
            ShareError: `source` is missing.
        """
        if not os.path.exists(source):
            raise ShareError(f"copying {source}: it does not exist")
        where = GUEST_DIR / shared_name(container_id, destination)
        self._wanted.append((Path(source), where))
        return where

    def remove_container(self, container_id: str) -> None:
        """The copies are the guest's, and go with it."""
        self._wanted.clear()

    async def send(self, call: Call) -> None:
        """Copy all that was added.

        Args:
            call: of the agent.

        Raises:
            ShareError: something can't be read, or it is too much.
            RpcError: the agent refused it.
        """
        for source, where in self._wanted:
            try:
                for path, target in _entries(source.resolve(), where):
                    await self._send_entry(path, target, call)
            except OSError as error:
                raise ShareError(f"copying {error.filename or source}: {error.strerror}") from error
        self._wanted.clear()

    async def _send_entry(self, path: Path, target: Path, call: Call) -> None:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        self._entries += 1
        self._bytes += status.st_size if kind == stat.S_IFREG else 0
        if self._entries > _MOST_ENTRIES or self._bytes > _MOST_BYTES:
            raise ShareError(
                f"copying {path}: the bind mounts of a container may have {_MOST_ENTRIES} entries"
                f' and {_MOST_BYTES >> 20} MiB with shared_fs = "none"'
            )
        if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            log.warning("not copied to the guest: %s is neither file, directory nor link", path)
            return
        request = agent_pb2.CopyFileRequest(
            path=str(target),
            file_mode=status.st_mode,
            dir_mode=0o755,
            uid=status.st_uid,
            gid=status.st_gid,
        )
        if kind == stat.S_IFLNK:
            request.data = os.readlink(bytes(path))
        if kind != stat.S_IFREG:
            await call("CopyFile", request)
            return
        with path.open("rb") as file:
            # Of the size that it has now, should somebody write to it.
            request.file_size = os.fstat(file.fileno()).st_size
            while True:
                request.data = file.read(min(_PIECE, request.file_size - request.offset))
                await call("CopyFile", request)
                request.offset += len(request.data)
                if request.offset >= request.file_size:
                    return
                if not request.data:
                    raise ShareError(f"copying {path}: it became shorter meanwhile")


def _entries(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """Of a file or a whole directory, each directory before what is in it."""
    yield source, target
    if not source.is_dir():
        return
    for directory, names, files in os.walk(source):
        for name in sorted((*names, *files)):
            path = Path(directory, name)
            yield path, target / path.relative_to(source)
