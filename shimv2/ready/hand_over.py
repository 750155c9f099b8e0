# SPDX-License-Identifier: Apache-2.0
"""``start`` asks for a ready shim, over a socket of packets.

First the shim, just forked, sends `HERE`: a descriptor that was sent to a process that is stopped
would be open as long as that is, and a socket be listened on that nobody serves.  The request is JSON with two descriptors, the shim's listening socket and the pipe by which
``start`` tells it that it is on record.  The answer is ``{"pid": PID}``, sent by the shim itself
once it is as ``start`` would have made it, or ``{"error": TEXT}``.
"""

from __future__ import annotations

import os
import sys
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET
from _socket import socket as Socket  # `start` is faster without the rest of socket

from shimv2 import light_json
from shimv2.ready import likeness
from shimv2.state import READY_SHIMS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

ANSWER_LIMIT = 1.0
"""Seconds for a fork and some system calls; then ``start`` goes on without."""
MAX_MESSAGE = 192 << 10  # bytes; half of it may be the environment, and sockets take 208 KiB
HERE = b"here"
_SUN_PATH = 107 - len(".new")  # sun_path, and what the name has until it is ready


def socket_path() -> str:
    """Of this installation's nursery; "" where its path is too long for a socket's.

    The directory that it lies in is the nursery's own.
    """
    name = str(likeness.code()[0]).strip("/").replace("/", "-")
    path = f"{READY_SHIMS}/{name}/sock"
    return path if len(path) <= _SUN_PATH else ""


def ready_shim(argv: list[str], stdin: bytes, listener: Socket) -> tuple[int, int]:
    """Ask for a shim that serves `listener`.

    Args:
        argv: ``start``'s flags.
        stdin: what containerd has sent to ``start``.

    Returns:
        Its pid, 0 if there is none, and the writing end of a pipe: with a byte in it the shim
        serves, at its end without one the shim ends too.  No other shim reads that pipe, so
        one whose answer comes too late can't take the byte of its successor.
    """
    recorded, record = os.pipe()
    try:
        pid = _ask(argv, stdin, [listener.fileno(), recorded])
    finally:
        os.close(recorded)
    if not pid:
        os.close(record)
    return pid, record


def _ask(argv: list[str], stdin: bytes, descriptors: list[int]) -> int:
    nursery = Socket(AF_UNIX, SOCK_SEQPACKET)
    nursery.settimeout(ANSWER_LIMIT)
    try:
        try:
            nursery.connect(socket_path())
        except OSError:  # the usual case: nobody keeps ready shims here
            return 0
        request = light_json.dumps(
            {
                "argv": argv,
                "stdin": stdin.decode("latin-1"),
                "code": likeness.code(),
                "fixed": likeness.fixed(),
                "inherited": likeness.inherited(),
            }
        ).encode()
        if len(request) > MAX_MESSAGE or nursery.recv(len(HERE)) != HERE:
            return 0
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in descriptors)
        nursery.sendmsg([request], [(SOL_SOCKET, SCM_RIGHTS, rights)])
        answer = light_json.loads(nursery.recv(MAX_MESSAGE))
        return int(answer.get("pid", 0))
    except (OSError, ValueError):
        return 0
    finally:
        nursery.close()


def receive(peer: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request of a ``start``, and its two descriptors.

    Raises:
        OSError, ValueError: it is none.
    """
    import socket

    data, descriptors, flags, _ = socket.recv_fds(peer, MAX_MESSAGE, 2)
    for fd in descriptors:
        os.set_inheritable(fd, False)  # they came without FD_CLOEXEC
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) != 2:
            raise ValueError("not a request for a shim")
        request = light_json.loads(data)
        if not isinstance(request, dict):
            raise ValueError("a request is a JSON object")
    except ValueError:
        for fd in descriptors:
            os.close(fd)
        raise
    return request, descriptors
