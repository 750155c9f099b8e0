# SPDX-License-Identifier: Apache-2.0
"""JSON for `start` and `delete`: the C parts of the package json, which itself imports re and enum.

Those two take longer than the rest of what ``start`` and ``delete`` load.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_WHITE = " \t\r\n"


def dumps(value: object) -> str:
    """What json.dumps gives, without spaces.

    Raises:
        TypeError: something that JSON does not know.
    """
    return "".join(_encode(value, 0))


def loads(data: str | bytes) -> Any:
    """What json.loads gives.

    Raises:
        ValueError: it is no JSON; json.JSONDecodeError where that says more.
    """
    text = data.decode() if isinstance(data, bytes) else data
    start = len(text) - len(text.lstrip(_WHITE))
    try:
        value, end = _scan(text, start)
    except StopIteration as error:
        raise ValueError(f"no JSON value at character {error.value}") from None
    if text[end:].strip(_WHITE):
        raise ValueError(f"more than one JSON value: character {end}")
    return value


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} in a JSON document")


class _Settings:
    """What the scanner reads of a json.JSONDecoder."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON value")


_encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)
_scan = make_scanner(_Settings)  # type: ignore[arg-type]  # whatever has these attributes
