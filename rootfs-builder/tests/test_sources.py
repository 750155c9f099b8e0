# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from guestbuild import description, sources
from guestbuild.errors import BuildError

GUEST = description.load(Path(__file__).resolve().parent.parent / "guest.yaml")
STANZAS = """\
Types: deb
# Suites: a-comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/some.gpg

Types: deb deb-src
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
 contrib

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
"""
LINES = """\
# deb http://comment.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib
deb-src http://mirror.example/debian bookworm main
deb http://other.example/tool stable-tool main
"""


def test_stanzas() -> None:
    assert list(sources.parse_deb822(STANZAS)) == [
        sources.Entry("http://mirror.example/debian", "bookworm", "/usr/share/keyrings/some.gpg"),
        sources.Entry(
            "http://mirror.example/debian", "bookworm-updates", "/usr/share/keyrings/some.gpg"
        ),
        sources.Entry("http://security.example/debian-security", "bookworm-security", None),
    ]


def test_lines() -> None:
    assert list(sources.parse_list(LINES)) == [
        sources.Entry("http://mirror.example/debian", "bookworm", "/k.gpg"),
        sources.Entry("http://other.example/tool", "stable-tool", None),
    ]


def test_host_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(LINES)
    (tmp_path / "sources.list.d/debian.sources").write_text(STANZAS)
    (tmp_path / "sources.list.d/old.save").write_text(LINES)
    assert len(sources.host_entries(tmp_path)) == 5


def lines(**options: object) -> list[str]:
    entries = list(sources.parse_deb822(STANZAS))
    settings: dict[str, object] = {"entries": entries, "environment": {}} | options
    return list(sources.archive(GUEST, **settings).lines)  # type: ignore[arg-type]


def test_mirror_and_security_are_the_hosts() -> None:
    key = "[signed-by=/usr/share/keyrings/some.gpg]"
    assert lines() == [
        f"deb {key} http://mirror.example/debian trixie main",
        f"deb {key} http://security.example/debian-security trixie-security main",
    ]


def test_a_given_mirror_wins_and_brings_no_foreign_security_archive() -> None:
    for options in (
        {"mirror": "http://own/"},
        {"environment": {"PYKATA_DEBIAN_MIRROR": "http://own/"}},
    ):
        assert lines(**options) == [f"deb [signed-by={sources.KEYRING}] http://own/ trixie main"]


def test_security_mirror_by_environment() -> None:
    given = {"PYKATA_DEBIAN_MIRROR": "http://own/", "PYKATA_DEBIAN_SECURITY_MIRROR": "http://sec/"}
    assert lines(environment=given)[1].endswith("http://sec/ trixie-security main")


def test_other_distributions_sources_are_not_debian() -> None:
    with pytest.raises(BuildError, match="--mirror"):
        lines(entries=[sources.Entry("http://ubuntu.example/ubuntu", "jammy")])


def test_unstable_has_no_security_archive() -> None:
    guest = dataclasses.replace(GUEST, suite="sid")
    found = sources.archive(guest, entries=list(sources.parse_deb822(STANZAS)), environment={})
    assert len(found.lines) == 1
