# SPDX-License-Identifier: Apache-2.0
"""CopyFile: files that reach the guest in pieces, where nothing is shared.

Everything happens below one directory, each component of a path opened without following
links: a link that an earlier request made can't lead a later one out of there. Data goes to a
file `NAME.tmp` beside the target, which is renamed over it when it has its full size.
"""

from __future__ import annotations

import contextlib
import os
import stat

from agent.storage import SHARE
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.api import agent_pb2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_file(request: agent_pb2.CopyFileRequest, root: str = SHARE) -> None:
    """One piece of a file, a directory or a symbolic link (the type bits of file_mode say which).

    Raises INVALID_ARGUMENT (path outside `root`, sizes that don't fit), FAILED_PRECONDITION
    (a piece with a gap before it), INTERNAL.
    """
    parts = _relative_parts(request.path, root)
    kind = stat.S_IFMT(request.file_mode)
    if request.uid < -1 or request.gid < -1:
        raise RpcError(
            Code.INVALID_ARGUMENT, f"{request.path}: uid {request.uid} gid {request.gid}"
        )
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        parent = _open_parents(root, parts[:-1], request)
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"copy to {request.path}: {error}") from error
    try:
        if kind == stat.S_IFDIR:
            _make_directory(request, parent, parts[-1])
        elif kind == stat.S_IFLNK:
            _make_link(request, parent, parts[-1])
        elif kind in (0, stat.S_IFREG):
            _write_piece(request, parent, parts[-1])
        else:
            raise RpcError(
                Code.INVALID_ARGUMENT, f"{request.path}: file type of mode {request.file_mode:#o}"
            )
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"copy to {request.path}: {error}") from error
    finally:
        os.close(parent)


def _relative_parts(path: str, root: str) -> list[str]:
    prefix = root.rstrip("/") + "/"
    parts = [part for part in path[len(prefix) :].split("/") if part not in ("", ".")]
    if not path.startswith(prefix) or not parts or ".." in parts or "\0" in path:
        raise RpcError(Code.INVALID_ARGUMENT, f"path {path!r} is not below {root}")
    return parts


def _open_parents(root: str, parts: list[str], request: agent_pb2.CopyFileRequest) -> int:
    """Open the directory that is to hold the file, made with dir_mode where it is missing."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    mode = stat.S_IMODE(request.dir_mode) or 0o750
    try:
        for part in parts:
            made = False
            try:
                os.mkdir(part, mode, dir_fd=descriptor)
                made = True
            except FileExistsError:
                pass
            below = os.open(part, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
            if made:  # mkdir's mode goes through the umask
                os.fchmod(descriptor, mode)
                os.fchown(descriptor, request.uid, request.gid)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make_directory(request: agent_pb2.CopyFileRequest, parent: int, name: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        os.fchown(descriptor, request.uid, request.gid)
        os.fchmod(descriptor, stat.S_IMODE(request.file_mode))
    finally:
        os.close(descriptor)


def _make_link(request: agent_pb2.CopyFileRequest, parent: int, name: str) -> None:
    if not request.data or b"\0" in request.data:
        raise RpcError(Code.INVALID_ARGUMENT, f"{request.path}: link target {request.data!r}")
    fresh = f"{name}.tmp"
    _remove(fresh, parent)
    os.symlink(request.data, os.fsencode(fresh), dir_fd=parent)
    os.chown(fresh, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)
    _rename(fresh, name, parent)


def _write_piece(request: agent_pb2.CopyFileRequest, parent: int, name: str) -> None:
    offset, size, data = request.offset, request.file_size, request.data
    if offset < 0 or size < 0 or offset + len(data) > size:
        raise RpcError(
            Code.INVALID_ARGUMENT,
            f"{request.path}: {len(data)} bytes at {offset} of a file of {size}",
        )
    fresh = f"{name}.tmp"
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    if offset == 0:
        _remove(fresh, parent)
        flags |= os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(fresh, flags, 0o600, dir_fd=parent)
    except FileNotFoundError:
        raise RpcError(
            Code.FAILED_PRECONDITION, f"{request.path}: nothing written before offset {offset}"
        ) from None
    try:
        present = os.fstat(descriptor).st_size
        if present < offset:
            raise RpcError(
                Code.FAILED_PRECONDITION, f"{request.path}: offset {offset}, {present} bytes there"
            )
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        if offset < size:
            return
        os.ftruncate(descriptor, size)
        os.fchown(descriptor, request.uid, request.gid)
        os.fchmod(descriptor, stat.S_IMODE(request.file_mode))
    finally:
        os.close(descriptor)
    _rename(fresh, name, parent)


def _rename(fresh: str, name: str, parent: int) -> None:
    """Put the finished entry in place, over a file or link but never over a directory."""
    os.rename(fresh, name, src_dir_fd=parent, dst_dir_fd=parent)


def _remove(name: str, parent: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)
