# SPDX-License-Identifier: Apache-2.0
"""Asks a sandbox's shim by its management socket."""

from __future__ import annotations

import http.client
import socket

from shimv2.state import management_socket

_LIMIT = 70.0  # seconds; the shim itself gives up after 60
_ANSWER_LIMIT = 64 << 20  # bytes


class ManagementError(Exception):
    """What the shim said, or why it could not be asked."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(sandbox_id: str, method: str, target: str, body: bytes | None = None) -> bytes:
    """The body of the shim's answer.

    Args:
        sandbox_id: the whole id.
        target: path and query, encoded.

    Raises:
        ManagementError: names the sandbox and what went wrong.
    """
    path = management_socket(sandbox_id)
    connection = _UnixConnection(str(path))
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        answer = response.read(_ANSWER_LIMIT)
    except PermissionError as error:
        raise ManagementError(f"{path}: {error.strerror}; run it as root") from error
    except (OSError, http.client.HTTPException) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ManagementError(f"sandbox {sandbox_id}: {path}: {reason}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        text = answer.decode(errors="replace").strip()
        raise ManagementError(f"sandbox {sandbox_id}: {text or response.reason}")
    return answer
