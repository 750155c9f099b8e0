# SPDX-License-Identifier: Apache-2.0
"""Status codes and the errors that carry them."""

from __future__ import annotations

import enum

TYPE_CHECKING = False  # importing typing costs the guest agent milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.any_pb2 import Any


class Code(enum.IntEnum):
    """The status codes of gRPC, which ttrpc shares."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_CODES = {int(code): code for code in Code}


def code_of(number: int) -> Code:
    """The code with that number; a number that nobody defined is UNKNOWN."""
    return _CODES.get(number, Code.UNKNOWN)


class RpcError(Exception):
    """A call that ended with another status than OK.

    Raised by an implementation to answer that status, and by a client's call that got it.

    Attributes:
        code: what went wrong.
        message: a sentence for people.
        details: messages that say more, each packed in an Any.
    """

    def __init__(self, code: Code, message: str, details: Sequence[Any] = ()) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.details = tuple(details)

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" if self.message else self.code.name


class ConnectionLost(RpcError):
    """The connection ended before the call did: the peer died, left, or broke the protocol."""

    def __init__(self, message: str = "the connection to the peer is lost") -> None:
        super().__init__(Code.UNAVAILABLE, message)


class ProtocolError(Exception):
    """The peer sent what no ttrpc peer sends. The connection can't be used any longer."""
