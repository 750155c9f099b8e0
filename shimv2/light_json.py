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
        ValueError: it is no JSON; what json says of it.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value, end = _scan(text, len(text) - len(text.lstrip(_WHITE)))
    except (StopIteration, ValueError, SystemError):  # the last where json.decoder is not loaded
        end = -1
    if end < 0 or text[end:].strip(_WHITE):
        import json

        return json.loads(text)
    return value


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} in a JSON document")


class _Settings:
    """What the scanner reads of a json.JSONDecoder."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = parse_constant = float
    parse_int = int


_encode = make_encoder(None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)
_scan = make_scanner(_Settings)  # type: ignore[arg-type]  # whatever has these attributes
