# SPDX-License-Identifier: Apache-2.0
"""The process that has imported all that a shim needs, and forks one for each ``start``.

It has one thread, never runs trio itself, and ends when its stdin does, or by SIGTERM.  Nothing
of a sandbox is ever read in it: the fork is made first, and the child reads the request.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

from shimv2 import cli
from shimv2.bootstrap import parse_params
from shimv2.ready import hand_over, likeness
from shimv2.state import READY_SHIMS
from shimv2.version import SHIM_BINARY
from ttrpc import upb

# What a shim loads in any case, and what it loads while it starts a container.
_WANTED = (
    "encodings.unicode_escape",
    "shimv2.boot.history",
    "shimv2.daemon",
    "shimv2.factory.templates",
    "tomllib",
    "vmm.vsock.hybrid_server",
)
FILLER = "x" * 400
"""Last argument of the nursery's command line: room for a shim's, which the child writes there."""
_REQUEST_LIMIT = 5.0  # seconds
_ACCEPT_PAUSE = 0.1  # seconds, where there is no descriptor for another peer


UPDATED = 3
"""Exit status of a nursery whose files are not those any more that it has loaded."""


def main(code: list[object]) -> int:
    """Serve until stdin ends; returns the exit status, 0 also where another process serves.

    Args:
        code: `likeness.code` of what this process has loaded.
    """
    path = hand_over.socket_path()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), _only_one(os.path.dirname(path)) as first:
        if not first:
            return 0
        upb.install()
        for name in _WANTED:
            __import__(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"{path}.new")
            listener.listen(64)
            os.rename(f"{path}.new", path)  # what is seen is ready
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
            gc.collect()
            gc.freeze()  # else the first collection in each child copies all of it
            return _serve(listener, code)
    return 0


@contextlib.contextmanager
def _only_one(directory: str) -> Iterator[bool]:
    """Make `directory` ours and empty; False if it is another living process's."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(fd), os.stat(directory))
        except (BlockingIOError, FileNotFoundError):
            same = False  # it is in use, or its owner has just taken it away
        if same:
            _empty(directory)
        try:
            yield same
        finally:
            if same:
                _empty(directory)
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
                    os.rmdir(READY_SHIMS)  # unless another installation has something there
    finally:
        os.close(fd)


def _empty(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(f"{directory}/{name}")


def _serve(listener: socket.socket, code: list[object]) -> int:
    while True:
        readable, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in readable:
            return 0
        if _is_updated(code):
            return UPDATED
        try:
            peer, _ = listener.accept()
        except OSError as error:
            _say(error)
            time.sleep(_ACCEPT_PAUSE)
            continue
        with peer:
            try:
                forked = _user_of(peer) == 0 and os.fork() == 0
            except OSError as error:  # no memory or process left; `start` will say so if it lasts
                _say(error)
                continue
            if forked:
                _child(peer, code)


def _is_updated(code: list[object]) -> bool:
    try:
        return likeness.code() != code
    except OSError:  # uninstalled, or an update is under way
        return True


def _say(error: Exception) -> None:
    print(f"no ready shim: {error}", file=sys.stderr, flush=True)


def _user_of(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1])


def _child(peer: socket.socket, code: list[object]) -> None:
    """Become the shim that `peer` asks for; never returns."""
    try:
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        # The nursery's lock and socket are not ours to keep when it is killed.
        os.closerange(3, peer.fileno())
        os.closerange(peer.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        peer.settimeout(_REQUEST_LIMIT)
        peer.send(hand_over.HERE)
        request, (listener_fd, recorded) = hand_over.receive(peer)
        try:
            _compare(request, code)
            likeness.take_over(request["inherited"])
            argv = [str(word) for word in request["argv"]]
            args = cli.Arguments(argv)
            params = parse_params(str(request["stdin"]).encode("latin-1"), args.id, args.namespace)
            _rename(argv)
        except Exception as error:
            _say(error)
            peer.send(json.dumps({"error": str(error)}).encode())
            os._exit(1)
        peer.send(json.dumps({"pid": os.getpid()}).encode())
        cli.serve(args, params, socket.socket(fileno=listener_fd), recorded)
    finally:
        os._exit(1)


def _compare(request: dict[str, Any], code: list[object]) -> None:
    """Raises DifferentError: `start` would make another process than this can become."""
    if request["code"] != code:
        raise likeness.DifferentError("this is another version than the one that is installed now")
    theirs, own = request["fixed"], likeness.fixed()
    for name in sorted({*theirs, *own}):
        if theirs.get(name) != own.get(name):
            raise likeness.DifferentError(
                f"{name}: {theirs.get(name)!r} of `start` is not {own.get(name)!r}"
            )


def _rename(argv: list[str]) -> None:
    """Show the shim's command line in /proc/PID/cmdline, as far as there is room."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: 48 and 49 in proc(5)
    line = b"\0".join(os.fsencode(word) for word in (SHIM_BINARY, *argv))
    room = end - begin
    ctypes.memmove(begin, line[: room - 1].ljust(room, b"\0"), room)
