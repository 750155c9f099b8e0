# SPDX-License-Identifier: Apache-2.0
"""Debian packages unpacked into a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from guestbuild.apt import acquire_options
from guestbuild.command import run
from guestbuild.sources import Archive


def unpack(packages: Iterable[str], archive: Archive, target: Path, *more: str) -> None:
    """Packages and what they depend on; no maintainer script runs.

    Args:
        more: further options of mmdebstrap.

    Raises:
        BuildError: one is missing, or the archive can't be reached.
    """
    options = [
        "--variant=extract",
        "--mode=root",
        "--quiet",
        f"--include={','.join(packages)}",
        '--aptopt=APT::Install-Recommends "false"',
        *more,
        *(f"--aptopt={line}" for line in acquire_options()),
    ]
    run(["mmdebstrap", *options, archive.suite, target, *archive.lines])
