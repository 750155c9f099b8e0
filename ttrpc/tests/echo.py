# SPDX-License-Identifier: Apache-2.0
"""A service of well-known messages only, for tests here, against Go, and for the benchmark."""

from __future__ import annotations

import contextlib
from typing import Any

import trio
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, wrappers_pb2
from google.protobuf.wrappers_pb2 import BytesValue, DoubleValue, Int64Value, StringValue

from ttrpc.errors import Code, RpcError

_METHODS = (
    # name, request, reply, stream of requests, stream of replies
    ("Echo", "BytesValue", "BytesValue", False, False),
    ("Make", "Int64Value", "BytesValue", False, False),
    ("Fail", "StringValue", "StringValue", False, False),
    ("Metadata", "StringValue", "StringValue", False, False),
    ("Deadline", "StringValue", "DoubleValue", False, False),
    ("Sleep", "DoubleValue", "StringValue", False, False),
    ("Missing", "StringValue", "StringValue", False, False),
    ("Sum", "Int64Value", "Int64Value", True, False),
    ("Count", "Int64Value", "Int64Value", False, True),
    ("Chat", "StringValue", "StringValue", True, True),
)


def _service() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="ttrpc/tests/echo.proto",
        package="pykata.test",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    service = file.service.add(name="Echo")
    for name, request, reply, client_streaming, server_streaming in _METHODS:
        service.method.add(
            name=name,
            input_type=f".google.protobuf.{request}",
            output_type=f".google.protobuf.{reply}",
            client_streaming=client_streaming,
            server_streaming=server_streaming,
        )
    pool = descriptor_pool.Default()
    with contextlib.suppress(TypeError):  # added before by another import of this file
        pool.Add(file)
    return pool.FindServiceByName("pykata.test.Echo")


ECHO = _service()


class Echo:
    """Answers; counts what was cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.cancelled_event = trio.Event()
        self.started = trio.Event()

    async def Echo(self, request: Any, context: Any) -> Any:
        return request

    async def Make(self, request: Any, context: Any) -> Any:
        return BytesValue(value=bytes(request.value))

    async def Fail(self, request: Any, context: Any) -> Any:
        detail = any_pb2.Any()
        detail.Pack(StringValue(value="a detail"))
        raise RpcError(Code.NOT_FOUND, request.value, [detail])

    async def Metadata(self, request: Any, context: Any) -> Any:
        return StringValue(value=",".join(context.metadata.get(request.value, [])))

    async def Deadline(self, request: Any, context: Any) -> Any:
        return DoubleValue(value=context.deadline - trio.current_time())

    async def Sleep(self, request: Any, context: Any) -> Any:
        self.started.set()
        try:
            await trio.sleep(request.value)
        except trio.Cancelled:
            self.cancelled += 1
            self.cancelled_event.set()
            raise
        return StringValue(value="slept")

    async def Sum(self, messages: Any, context: Any) -> Any:
        return Int64Value(value=sum([message.value async for message in messages]))

    async def Count(self, request: Any, context: Any) -> None:
        if request.value < 0:
            raise RpcError(Code.OUT_OF_RANGE, "below zero")
        for number in range(request.value):
            await context.send(Int64Value(value=number))

    async def Chat(self, messages: Any, context: Any) -> None:
        async for message in messages:
            await context.send(StringValue(value=message.value.upper()))
