# SPDX-License-Identifier: Apache-2.0
"""Writes the sample configuration.toml and the reference table from the keys.

python -m shimv2.config.document toml [hypervisor.kernel=/path …]
python -m shimv2.config.document markdown
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .agent import AgentConfig, MemAgentConfig
from .errors import ConfigError
from .factory import FactoryConfig
from .hypervisor import HypervisorConfig
from .keys import UNSET, Key, Section, Support, annotation_name, keys_of
from .runtime import RuntimeConfig
from .values import from_toml

SECTIONS: Mapping[str, type[Section]] = {
    "hypervisor.qemu": HypervisorConfig,
    "agent.kata": AgentConfig,
    "agent.kata.mem_agent": MemAgentConfig,
    "runtime": RuntimeConfig,
    "factory": FactoryConfig,
}
HEAD = """\
# Configuration of the pykata runtime (Kata Containers' keys, and a few of our own).
#
# A line that starts with # shows a default.  To change something, copy this file to
# /etc/kata-containers/configuration.toml, or put only what differs in a file of
# config.d/ beside it; there, files are read in the order of their names.
"""


def toml_value(value: Any) -> str:
    """A value in TOML."""
    if value is None or value == UNSET:
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(part) for part in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {toml_value(part)}" for name, part in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False)


def sample(values: Mapping[str, Mapping[str, Any]]) -> str:
    """configuration.toml with `values` (section → key → TOML value) set, other keys commented.

    Raises:
        ConfigError: a value that the loader would refuse.
    """
    lines = [HEAD]
    for section, known in SECTIONS.items():
        given = values.get(section, {})
        shown = [
            (item, key)
            for item, key in keys_of(known)
            if item.name in given or (key.sample and key.support is Support.YES)
        ]
        if not shown:
            continue
        lines.append(f"[{section}]\n")
        for item, key in shown:
            lines.extend(f"# {line}" for line in _comment(key))
            if item.name in given:
                from_toml(item, key, given[item.name], f"{section}.{item.name}")
                lines.append(f"{item.name} = {toml_value(given[item.name])}\n")
            else:
                lines.append(f"#{item.name} = {toml_value(item.default)}\n")
    return "\n".join(lines).rstrip("\n") + "\n"


def _comment(key: Key) -> list[str]:
    text = key.doc[0].upper() + key.doc[1:]
    if key.unit:
        text += f" ({key.unit})"
    if key.choices:
        text += ": " + ", ".join(f'"{choice}"' for choice in key.choices if choice)
    return textwrap.wrap(text + ".", 90, break_on_hyphens=False)


def markdown() -> str:
    """The reference: a table for each section."""
    return "\n".join(line for section in SECTIONS for line in _tables(section))


def _tables(section: str) -> Iterator[str]:
    yield f"### `[{section}]`\n"
    yield "| key | type | default | meaning | annotation | here |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for item, key in keys_of(SECTIONS[section]):
        default = f"`{toml_value(item.default)}`"
        if str(item.type) == "int | None" or str(item.type).startswith("Mapping"):
            default = "unset"
        annotation = annotation_name(item, key)
        cells = (
            "<br>".join(f"`{name}`" for name in (item.name, *key.aliases)),
            _kind(str(item.type)),
            default,
            _meaning(key),
            f"`{annotation}`" if annotation else "",
            _support(key),
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _kind(annotation: str) -> str:
    names = {"str": "text", "float": "number", "int": "whole number", "bool": "bool"}
    bare = annotation.removesuffix(" | None")
    if bare == "Path":
        return "path"
    if bare.startswith("tuple[str"):
        return "list of texts"
    if bare.startswith("tuple"):
        return "list of tables"
    return names.get(bare, "table")


def _meaning(key: Key) -> str:
    text = key.doc
    if key.unit:
        text += f" ({key.unit})"
    if key.choices:
        text += ": " + ", ".join(f"`{choice}`" for choice in key.choices if choice)
    if key.low is not None and key.high is not None and key.high < 1 << 31:
        text += f"; {key.low:.0f} to {key.high:.0f}"
    return text


def _support(key: Key) -> str:
    if key.own:
        return f"{key.support.value}, our own key"
    if key.support is Support.YES and "Q" not in key.vmms:
        return "not with QEMU"
    return key.support.value


def _assignments(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``section.key=value`` arguments; the value is TOML, or a bare text."""
    import tomllib

    values: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        section, _, key = name.rpartition(".")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        names = [item.name for item, _ in keys_of(SECTIONS[section])] if section in SECTIONS else []
        if key not in names:
            raise ConfigError(f"{name}: no such key")
        values.setdefault(section, {})[key] = value
    return values


def main(arguments: Sequence[str]) -> int:
    """Print what is asked for."""
    match list(arguments):
        case ["toml", *assignments]:
            print(sample(_assignments(assignments)), end="")
        case ["markdown"]:
            print(markdown(), end="")
        case ["markdown", file]:
            update(Path(file))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


BEGIN, END = "<!-- keys -->\n", "<!-- end of keys -->\n"


def update(file: Path) -> None:
    """Put the table between the two marks of a document."""
    head, _, rest = file.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    file.write_text(f"{head}{BEGIN}\n{markdown()}{END}{tail}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
