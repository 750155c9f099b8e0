# SPDX-License-Identifier: Apache-2.0
"""Where Debian packages come from: read out of the host's own apt configuration."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from guestbuild.errors import BuildError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DEBIAN_SUITE = re.compile(
    r"(buster|bullseye|bookworm|trixie|forky|sid|stable|testing|unstable|oldstable)(-[a-z]+)?/?$"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One `deb` source of the host."""

    uri: str
    suite: str
    signed_by: str | None = None


class Wanted(Protocol):
    """What has to be known of a description to find its archive."""

    @property
    def suite(self) -> str: ...
    @property
    def components(self) -> tuple[str, ...]: ...
    @property
    def mirror(self) -> str | None: ...
    @property
    def security_mirror(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class Archive:
    """A suite of Debian, as lines for sources.list."""

    suite: str
    lines: tuple[str, ...]

    def with_sources(self) -> Archive:
        """The same with its source packages."""
        sources = (line.replace("deb ", "deb-src ", 1) for line in self.lines)
        return Archive(self.suite, (*self.lines, *sources))


def parse_list(text: str) -> Iterable[Entry]:
    """Entries of the one-line format (`deb [options] URI SUITE COMPONENTS`)."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)", line)
        if match:
            signed = re.search(r"signed-by=(\S+)", match[1] or "")
            yield Entry(match[2], match[3], signed[1] if signed else None)


def parse_deb822(text: str) -> Iterable[Entry]:
    """Entries of the stanza format (`Types:`, `URIs:`, `Suites:`)."""
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and name:
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        signed = fields.get("signed-by")
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                # A key given inline, not as a path, can't be handed on as an option.
                yield Entry(uri, suite, signed if signed and signed.startswith("/") else None)


def host_entries(etc: Path = Path("/etc/apt")) -> list[Entry]:
    """All of the host's sources."""
    entries: list[Entry] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.is_file() and path.suffix in (".list", ".sources"):
            parse = parse_deb822 if path.suffix == ".sources" else parse_list
            entries += parse(path.read_text())
    return entries


def archive(
    description: Wanted,
    *,
    mirror: str | None = None,
    entries: list[Entry] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Archive:
    """The archive that a description's suite comes from.

    The mirror is the first given of: the argument, $PYKATA_DEBIAN_MIRROR, the description's, the
    one that the host's apt uses. The security archive likewise, and it may be absent.

    Raises:
        BuildError: None of them is known.
    """
    found = host_entries() if entries is None else entries
    plain = [entry for entry in found if _DEBIAN_SUITE.fullmatch(entry.suite)]
    main = [entry for entry in plain if "-" not in entry.suite.rstrip("/")]
    security = [entry for entry in plain if entry.suite.rstrip("/").endswith("-security")]
    uri = mirror or environment.get("PYKATA_DEBIAN_MIRROR") or description.mirror
    own = uri is not None
    if uri is None:
        if not main:
            raise BuildError(
                "no Debian mirror is known: this host's apt sources name none. Give one by "
                "--mirror, $PYKATA_DEBIAN_MIRROR or `mirror:` in the description"
            )
        uri = main[0].uri
    keyring = (main[0].signed_by if main and not own else None) or str(KEYRING)
    if not Path(keyring).exists() and entries is None:
        raise BuildError(f"{keyring}: missing (apt-get install debian-archive-keyring)")
    components = " ".join(description.components)
    signed = f"[signed-by={keyring}]"
    suite = description.suite
    lines = [f"deb {signed} {uri} {suite} {components}"]
    security_uri = environment.get("PYKATA_DEBIAN_SECURITY_MIRROR") or description.security_mirror
    if security_uri is None and security and not own:
        security_uri = security[0].uri
    if security_uri and suite not in ("sid", "unstable"):
        lines.append(f"deb {signed} {security_uri} {suite}-security {components}")
    return Archive(suite, tuple(lines))
