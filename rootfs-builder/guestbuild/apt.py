# SPDX-License-Identifier: Apache-2.0
"""An apt of our own: packages of another suite, without touching the host's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from guestbuild import digest
from guestbuild.command import run
from guestbuild.errors import BuildError
from guestbuild.sources import Archive


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The version of a package that apt would take."""

    name: str
    version: str


class Apt:
    """Looks packages up and downloads them. Its state lies under the cache directory."""

    def __init__(self, archive: Archive, cache: Path) -> None:
        self._state = cache / "apt" / f"{archive.suite}-{digest.of_value(archive.lines)}"
        self._archive = archive

    def update(self) -> None:
        """Fetch the package lists."""
        for part in ("lists/partial", "archives/partial", "parts"):
            (self._state / part).mkdir(parents=True, exist_ok=True)
        (self._state / "status").touch()
        (self._state / "sources.list").write_text("\n".join(self._archive.lines) + "\n")
        run(["apt-get", *self._options(), "update", "-q"])

    def ready(self) -> bool:
        """Whether package lists are there."""
        return any(self._state.glob("lists/*_Packages*"))

    def candidate(self, package: str) -> Candidate:
        """The candidate version.

        Raises:
            BuildError: The suite has no such package.
        """
        output = run(["apt-cache", *self._options(), "show", "--no-all-versions", package])
        version = re.search(r"^Version: (.+)$", output, re.M)
        if version is None:
            raise BuildError(f"{self._archive.suite} has no package {package}")
        return Candidate(package, version[1])

    def depends(self, package: str) -> list[str]:
        """Names in the package's Depends field (first alternatives)."""
        output = run(["apt-cache", *self._options(), "show", "--no-all-versions", package])
        field = re.search(r"^Depends: (.+)$", output, re.M)
        return [part.split()[0] for part in field[1].split(",")] if field else []

    def download(self, candidate: Candidate, folder: Path) -> Path:
        """Download one .deb into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        pattern = f"{candidate.name}_{candidate.version.replace(':', '%3a')}_*.deb"
        if not list(folder.glob(pattern)):
            spec = f"{candidate.name}={candidate.version}"
            # root's sandbox user can't write there; the files are verified all the same.
            sandbox = ["-o", "APT::Sandbox::User=root"]
            run(["apt-get", *self._options(), *sandbox, "-q", "download", spec], cwd=folder)
        (found,) = folder.glob(pattern)
        return found

    def source(self, package: str, folder: Path) -> Path:
        """Download the upstream tarball of a source package into an empty folder.

        The archive must be one with its sources.

        Raises:
            BuildError: There is none, or it is not what the signed lists say.
        """
        sandbox = ["-o", "APT::Sandbox::User=root"]
        words = ["source", "--download-only", "--tar-only", "-q", package]
        run(["apt-get", *self._options(), *sandbox, *words], cwd=folder)
        (found,) = folder.glob("*.orig.tar.*")
        return found

    def _options(self) -> list[str]:
        settings = {
            "Dir::State": self._state,
            "Dir::State::lists": self._state / "lists",
            "Dir::State::status": self._state / "status",
            "Dir::Cache": self._state,
            "Dir::Cache::archives": self._state / "archives",
            "Dir::Etc::SourceList": self._state / "sources.list",
            "Dir::Etc::SourceParts": self._state / "parts",
            "Dir::Etc::PreferencesParts": self._state / "parts",
            "APT::Architecture": "amd64",
            "APT::Update::Error-Mode": "any",
        }
        return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def acquire_options() -> list[str]:
    """How the host's apt reaches archives (proxies, certificates), as `key "value";` lines."""
    dump = run(["apt-config", "dump", "Acquire"])
    wanted = re.compile(r"Acquire::(https?(::|\s)|Check-|Retries|.*Proxy)", re.I)
    return [
        line.rstrip()
        for line in dump.splitlines()
        if wanted.match(line) and not re.search(r'\s"";\s*$', line)
    ]
