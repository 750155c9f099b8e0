# SPDX-License-Identifier: Apache-2.0
"""Python packages of the guest that come as wheels (protobuf), pinned by hash."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from guestbuild import digest
from guestbuild.command import run
from guestbuild.errors import BuildError


def fetch(requirements: tuple[str, ...], python: str, cache: Path) -> list[Path]:
    """Download wheels for the guest's Python (`3.13`), once.

    Args:
        requirements: pip's requirement lines, each with `--hash=sha256:…`.

    Raises:
        BuildError: pip is missing, or found no such wheel of that hash.
    """
    if not requirements:
        return []
    for requirement in requirements:
        if "--hash=" not in requirement:
            raise BuildError(f"wheels: {requirement!r} must have --hash=sha256:…")
    folder = cache / "wheels" / digest.of_value([requirements, python])
    wanted = len(requirements)
    if len(list(folder.glob("*.whl"))) != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        listing = folder / "requirements.txt"
        listing.write_text("\n".join(requirements) + "\n")
        platform = ["--platform", "manylinux2014_x86_64", "--python-version", python]
        run(
            [
                *(sys.executable, "-m", "pip", "download", "-q", "--no-deps"),
                *("--only-binary", ":all:", "--require-hashes", *platform),
                *("-d", folder, "-r", listing),
            ]
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != wanted:
        raise BuildError(f"{folder}: {len(wheels)} wheels for {wanted} requirements")
    return wheels


def unpack(wheel: Path, target: Path) -> None:
    """Unpack what a wheel installs into site-packages, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            top = member.filename.split("/", 1)[0]
            if not top.endswith((".dist-info", ".data")) and not member.is_dir():
                archive.extract(member, target)


def version(wheel: Path) -> tuple[str, str]:
    """(name, version) by the wheel's file name."""
    name, number, *_ = wheel.name.split("-")
    return name, number
