# SPDX-License-Identifier: Apache-2.0
"""Status codes and the errors that carry them."""

from __future__ import annotations

TYPE_CHECKING = False  # the guest agent imports this: typing and enum would cost it 50 ms
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import ClassVar

    from google.protobuf.any_pb2 import Any


class _Iterable(type):
    def __iter__(cls) -> Iterator[Code]:
        return iter(_CODES.values())


class Code(int, metaclass=_Iterable):
    """The status codes of gRPC, which ttrpc shares: integers that have names."""

    name: str

    OK: ClassVar[Code]
    CANCELLED: ClassVar[Code]
    UNKNOWN: ClassVar[Code]
    INVALID_ARGUMENT: ClassVar[Code]
    DEADLINE_EXCEEDED: ClassVar[Code]
    NOT_FOUND: ClassVar[Code]
    ALREADY_EXISTS: ClassVar[Code]
    PERMISSION_DENIED: ClassVar[Code]
    RESOURCE_EXHAUSTED: ClassVar[Code]
    FAILED_PRECONDITION: ClassVar[Code]
    ABORTED: ClassVar[Code]
    OUT_OF_RANGE: ClassVar[Code]
    UNIMPLEMENTED: ClassVar[Code]
    INTERNAL: ClassVar[Code]
    UNAVAILABLE: ClassVar[Code]
    DATA_LOSS: ClassVar[Code]
    UNAUTHENTICATED: ClassVar[Code]

    __str__ = int.__repr__

    def __repr__(self) -> str:
        return f"<Code.{self.name}: {int(self)}>"


def _make_codes() -> dict[int, Code]:
    codes = {}
    for number, name in enumerate(name for name in Code.__annotations__ if name.isupper()):
        code = codes[number] = Code(number)
        code.name = name
        setattr(Code, name, code)
    return codes


_CODES = _make_codes()


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
