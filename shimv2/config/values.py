# SPDX-License-Identifier: Apache-2.0
"""From a TOML value, or an annotation's text, to the value of a key."""

from __future__ import annotations

from dataclasses import Field
from pathlib import Path
from typing import Any, cast

from .errors import ConfigError
from .keys import Key

TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
MAX_TEXT = 64 << 10
SHOWN = 80


def shown(value: object) -> str:
    """A value as an error message shows it: TOML-like and short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    text = text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def bad(where: str, value: object, expected: str) -> ConfigError:
    """The one form of all complaints about a value."""
    return ConfigError(f"{where} = {shown(value)}: expected {expected}")


def from_toml(item: Field[Any], known: Key, value: object, where: str) -> Any:
    """Check a value read from a file and return it as its field's type.

    Args:
        where: file and dotted key, for messages.

    Raises:
        ConfigError: wrong type, out of bounds, not one of the choices, not absolute.
    """
    kind = str(item.type)
    if kind == "bool":
        if not isinstance(value, bool):
            raise bad(where, value, "true or false")
        return value
    if kind in ("int", "int | None"):
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(where, value, _number("a whole number", known))
        return _bounded(value, known, where)
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise bad(where, value, _number("a number", known))
        if abs(value) > 1 << 53:
            raise bad(where, value, "a number of sensible size")
        return _bounded(float(value), known, where)
    if kind == "tuple[str, ...]":
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise bad(where, value, "a list of texts")
        for part in value:
            _plain(part, where)
        return tuple(value)
    if kind.startswith("tuple[Mapping"):
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise bad(where, value, "a list of tables")
        return tuple(value)
    if kind.startswith("Mapping"):
        if not isinstance(value, dict):
            raise bad(where, value, "a table")
        return value
    if not isinstance(value, str):
        raise bad(where, value, "a text")
    _plain(value, where)
    if kind.startswith("Path"):
        return _path(item, value, where)
    return _choice(known, value, where)


def from_text(item: Field[Any], known: Key, text: str, where: str) -> Any:
    """Check an annotation's text and return it as its field's type.

    Raises:
        ConfigError: as `from_toml`.
    """
    kind = str(item.type)
    text = text.strip()
    if kind == "bool":
        if text not in TRUE | FALSE:
            raise bad(where, text, "true or false")
        return text in TRUE
    if kind in ("int", "int | None"):
        if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 20):
            raise bad(where, text, _number("a whole number", known))
        return from_toml(item, known, int(text), where)
    if kind == "float":
        try:
            number = float(text)
        except ValueError:
            raise bad(where, text, _number("a number", known)) from None
        return from_toml(item, known, number, where)
    if kind.startswith("tuple"):
        return from_toml(item, known, _list(known, text, where), where)
    return from_toml(item, known, text, where)


def _list(known: Key, text: str, where: str) -> object:
    if known.separator == "json" and text.startswith("["):
        import json

        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise bad(where, text, "a JSON list") from None
    separator = "," if known.separator == "json" else known.separator
    return [part.strip() for part in text.split(separator) if part.strip()]


def _number(what: str, known: Key) -> str:
    unit = f" {known.unit}" if known.unit else ""
    if known.low is not None and known.high is not None:
        return f"{what} from {known.low:.0f} to {known.high:.0f}{unit}"
    if known.low is not None:
        return f"{what} of at least {known.low:.0f}{unit}"
    return what


def _bounded(value: float, known: Key, where: str) -> float:
    too_low = known.low is not None and value < known.low
    too_high = known.high is not None and value > known.high
    if too_low or too_high:
        what = "a whole number" if isinstance(value, int) else "a number"
        raise bad(where, value, _number(what, known))
    return value


def _plain(text: str, where: str) -> None:
    if "\0" in text:
        raise bad(where, text, "a text without NUL")
    if len(text) > MAX_TEXT:
        raise bad(where, text, f"at most {MAX_TEXT} characters")


def _path(item: Field[Any], text: str, where: str) -> Path | None:
    if not text:
        return None if "None" in str(item.type) else cast(Path, item.default)
    path = Path(text)
    if not path.is_absolute() or len(text) > 4095:
        raise bad(where, text, "an absolute path")
    return path


def _choice(known: Key, text: str, where: str) -> str:
    if not known.choices:
        return text
    text = known.synonyms.get(text, text)
    if text in known.foreign:
        can = ", ".join(f'"{choice}"' for choice in known.choices if choice)
        raise ConfigError(f'{where} = "{text}": Kata knows it, this runtime has only {can}')
    if text not in known.choices:
        raise bad(where, text, "one of " + ", ".join(f'"{c}"' for c in known.choices if c))
    return text
