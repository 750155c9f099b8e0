# SPDX-License-Identifier: Apache-2.0
"""``binary://``: a process's output goes to a logger program of the host.

The logger gets stdout on descriptor 3, stderr on 4, and says on 5 that it is ready: by a byte
or by closing it (``binary://``), by a byte only (``binary-v2://``).
"""

from __future__ import annotations

import logging
import os
import signal
from urllib.parse import parse_qsl, unquote

import trio

from shimv2.endpoints import Sink, StdioError, enlarge, split_uri
from shimv2.host_process import HostProcess

SCHEMES = ("binary", "binary-v2")

_READY_LIMIT = 10.0  # seconds
_FLUSH_LIMIT = 2.0  # seconds to end by itself once both pipes are closed
_TERM_LIMIT = 12.0  # seconds between SIGTERM and SIGKILL, as containerd has it

log = logging.getLogger(__name__)


class BinaryLogger:
    """A running logger; owned by a `Stdio`, ended by `stop`.

    Attributes:
        stdout, stderr: the pipes to it.
    """

    def __init__(self, uri: str, process: HostProcess, stdout: Sink, stderr: Sink) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self._uri = uri
        self._process = process

    @classmethod
    async def start(
        cls, uri: str, *, container_id: str, namespace: str, mount_namespace: int | None
    ) -> BinaryLogger:
        """Run the logger and wait until it is ready.

        Raises:
            StdioError: it can't be run, or ended or kept silent instead; names `uri`.
        """
        scheme, rest = split_uri(uri)
        path, _, query = rest.partition("?")
        path = unquote(path)
        if not path.startswith("/"):
            raise StdioError(f"logger {uri!r}: its path must be absolute")
        args = [path]
        seen: set[str] = set()
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in seen:  # containerd passes the first of each
                seen.add(key)
                args += [key, value]
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        ready, ready_write = os.pipe2(os.O_CLOEXEC)
        stdout = Sink(uri, out_write, is_pipe=True)
        stderr = Sink(uri, err_write, is_pipe=True)
        for fd in (out_write, err_write):
            os.set_blocking(fd, False)
            enlarge(fd)
        os.set_blocking(ready, False)
        try:
            process = HostProcess.start(
                path,
                args,
                {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace},
                descriptors={3: out_read, 4: err_read, 5: ready_write},
                mount_namespace=mount_namespace,
            )
        except OSError as error:
            stdout.close()
            stderr.close()
            os.close(ready)
            raise StdioError(f"logger {uri!r}: {error.strerror}") from None
        finally:
            for fd in (out_read, err_read, ready_write):
                os.close(fd)
        logger = cls(uri, process, stdout, stderr)
        try:
            await logger._wait_ready(ready, needs_byte=scheme == "binary-v2")
        except BaseException:
            stdout.close()
            stderr.close()
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            process.close()
            raise
        finally:
            os.close(ready)
        return logger

    async def _wait_ready(self, ready: int, *, needs_byte: bool) -> None:
        with trio.move_on_after(_READY_LIMIT):
            await trio.lowlevel.wait_readable(ready)
            if not os.read(ready, 1) and needs_byte:
                raise StdioError(f"logger {self._uri!r}: ended before it was ready")
            return
        raise StdioError(f"logger {self._uri!r}: not ready within {_READY_LIMIT:.0f} s")

    async def stop(self) -> None:
        """End it, after both sinks were closed: that end first, then SIGTERM, then SIGKILL.

        Bounded; completes under cancellation too.
        """
        with trio.CancelScope(shield=True):
            for limit, number in (
                (_FLUSH_LIMIT, signal.SIGTERM),
                (_TERM_LIMIT, signal.SIGKILL),
            ):
                with trio.move_on_after(limit):
                    await self._process.wait()
                    break
                if number is signal.SIGKILL:
                    log.warning("logger %s did not end on SIGTERM", self._uri)
                self._process.kill(number)
            await self._process.wait()
            self._process.close()
