# SPDX-License-Identifier: Apache-2.0
"""A configuration of a test's own: the installed one, and what is overruled in it."""

from __future__ import annotations

import json
from pathlib import Path


def installed(prefix: Path) -> Path:
    """The file that `make install` put there."""
    return prefix / "share/defaults/kata-containers/configuration.toml"


class Configuration:
    """A copy of the installed configuration with drop-ins.

    Attributes:
        file: what a shim, or `kata-runtime`, is pointed at.
    """

    def __init__(self, prefix: Path, directory: Path) -> None:
        self._drop_ins = directory / "config.d"
        self._drop_ins.mkdir(parents=True)
        self.file = directory / "configuration.toml"
        self.file.write_text(installed(prefix).read_text())

    @property
    def flags(self) -> tuple[str | Path, ...]:
        """For `ctr run`."""
        return ("--runtime-config-path", self.file)

    def set(self, section: str, **values: object) -> None:
        """Overrule values of the installed configuration."""
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
        self._drop_in(section, *values).write_text(f"[{section}]\n{''.join(lines)}")

    def unset(self, section: str, *names: str) -> None:
        """Take back one `set` of these names."""
        self._drop_in(section, *names).unlink()

    def _drop_in(self, section: str, *names: str) -> Path:
        return self._drop_ins / f"{section}-{'-'.join(names)}.toml"
