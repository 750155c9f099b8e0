# SPDX-License-Identifier: Apache-2.0
"""The guest's side of a process's stdio: raw vsock streams, or the agent's RPCs."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import Message

from agent.api import agent_pb2
from ttrpc.errors import Code, RpcError
from vmm.vsock import VsockConnection

_CHUNK = 32 << 10  # of one Read/WriteStream call, as Kata's shim does

Call = Callable[[str, Message], Awaitable[Any]]
Read = Callable[[str, Message], Awaitable[Any]]


class SocketReader:
    """An output stream on a vsock connection of its own."""

    def __init__(self, connection: VsockConnection) -> None:
        self._connection = connection
        self.port = connection.host_port
        self.fd: int | None = connection.stream.socket.fileno()

    async def read(self, limit: int) -> bytes:
        """Up to `limit` bytes; b"" at the end."""
        return bytes(await self._connection.stream.receive_some(limit))

    async def delivered(self) -> None:
        """Return when all that the guest has sent so far can be read without waiting."""
        await self._connection.delivered()

    async def aclose(self) -> None:
        await self._connection.stream.aclose()


class SocketWriter:
    """The stdin stream on a vsock connection of its own; its close is the end of stdin."""

    def __init__(self, connection: VsockConnection) -> None:
        self._connection = connection
        self.port = connection.host_port
        self.fd: int | None = connection.stream.socket.fileno()

    async def write(self, data: bytes) -> None:
        await self._connection.stream.send_all(data)

    async def aclose(self) -> None:
        await self._connection.stream.aclose()


class RpcReader:
    """An output stream as ReadStdout or ReadStderr calls."""

    fd: int | None = None
    port = 0

    def __init__(self, read: Read, method: str, container_id: str, exec_id: str) -> None:
        self._read = read
        self._method = method
        self._ids = {"container_id": container_id, "exec_id": exec_id}

    async def read(self, limit: int) -> bytes:
        """Up to `limit` bytes; b"" at the end."""
        size = min(limit, _CHUNK)
        try:
            reply = await self._read(
                self._method, agent_pb2.ReadStreamRequest(**self._ids, len=size)
            )
        except RpcError:
            return b""  # Kata's agent tells the end by an error
        # The guest is not trusted to keep to the size asked for.
        data: bytes = reply.data
        return data[:size]

    async def delivered(self) -> None:
        """Nothing to wait for: a call returns what there is."""

    async def aclose(self) -> None:
        """Nothing is held."""


class RpcWriter:
    """The stdin stream as WriteStdin calls."""

    fd: int | None = None
    port = 0

    def __init__(self, call: Call, container_id: str, exec_id: str) -> None:
        self._call = call
        self._ids = {"container_id": container_id, "exec_id": exec_id}

    async def write(self, data: bytes) -> None:
        """Write all of `data`.

        Raises:
            RpcError: the process is gone, or its agent is.
        """
        view = memoryview(data)
        while view:
            reply = await self._call(
                "WriteStdin",
                agent_pb2.WriteStreamRequest(**self._ids, data=bytes(view[:_CHUNK])),
            )
            if not 0 < reply.len <= min(len(view), _CHUNK):
                raise RpcError(Code.INTERNAL, f"the agent took {reply.len} bytes of stdin")
            view = view[reply.len :]

    async def aclose(self) -> None:
        await self._call("CloseStdin", agent_pb2.CloseStdinRequest(**self._ids))


class ProcessStreams:
    """The streams of one process, each None where there is none."""

    def __init__(self) -> None:
        self.stdin: SocketWriter | RpcWriter | None = None
        self.stdout: SocketReader | RpcReader | None = None
        self.stderr: SocketReader | RpcReader | None = None

    def put_ports(
        self, request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest
    ) -> None:
        """Tell the agent which connection is which; 0 means by RPC."""
        request.stdin_port = self.stdin.port if self.stdin else 0
        request.stdout_port = self.stdout.port if self.stdout else 0
        request.stderr_port = self.stderr.port if self.stderr else 0

    async def aclose(self) -> None:
        """Close all; by RPC that can fail, for a process that never was."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(RpcError):
                    await stream.aclose()
