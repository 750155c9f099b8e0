# SPDX-License-Identifier: Apache-2.0
"""GetDiagnosticData: the message a container left for those who ask why it ended."""

from __future__ import annotations

import os

from ttrpc.errors import Code, RpcError

LIMIT = 4096
ANNOTATION = "io.kubernetes.container.terminationMessagePath"
DEFAULT_PATH = "/dev/termination-log"


def termination_log(log_type: str, source: str) -> str:
    """The first 4096 bytes of the file `source`, a path of the guest; empty if there is none.

    Raises INVALID_ARGUMENT for any log_type but `termination_log`, INTERNAL.
    """
    if log_type != "termination_log":
        raise RpcError(Code.INVALID_ARGUMENT, f"log_type {log_type!r}: only termination_log")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(source, flags)  # non-blocking: the container may have made it a fifo
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"termination log {source}: {error}") from error
    try:
        return os.read(descriptor, LIMIT).decode(errors="replace")
    except BlockingIOError:
        return ""
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"termination log {source}: {error}") from error
    finally:
        os.close(descriptor)
