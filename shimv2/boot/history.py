# SPDX-License-Identifier: Apache-2.0
"""The newest starts on this host, one JSON file each, under ``/run/vc/boot``.

A file is named by the start's time and its sandbox, so that the order of names is that of
starts, and a sandbox id that is used again does not hide the start before.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

HISTORY = Path("/run/vc/boot")
KEPT = 100
KINDS = ("cold", "template", "cache")

# As containerd's identifiers: no separator of paths, no leading dot.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NAME = re.compile(r"[0-9]{20}-[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\.json")


class BadRecordError(ValueError):
    """Names the field that has no place in a record, and its value."""


@dataclass(frozen=True, slots=True)
class BootRecord:
    """One start.

    Attributes:
        id, namespace: the sandbox's, and containerd's namespace it is in.
        kind: ``cold``, ``template`` or ``cache``.
        started: when the shim process began, nanoseconds since the epoch.
        marks: name → seconds after that.
        accelerator: ``kvm`` or ``tcg``; "" if it is not known.

    Raises:
        BadRecordError: a field is not what it should be.
    """

    id: str
    namespace: str
    kind: str
    started: int
    marks: dict[str, float]
    accelerator: str = ""

    def __post_init__(self) -> None:
        for field in ("id", "namespace"):
            value = getattr(self, field)
            if not isinstance(value, str) or not _ID.fullmatch(value):
                raise BadRecordError(f"{field} {value!r} is no identifier")
        if self.kind not in KINDS:
            raise BadRecordError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.accelerator not in ("", "kvm", "tcg"):
            raise BadRecordError(f"accelerator {self.accelerator!r} is neither kvm nor tcg")
        if type(self.started) is not int or not 0 <= self.started < 10**20:
            raise BadRecordError(f"started {self.started!r} is no time in nanoseconds")
        if not isinstance(self.marks, dict) or not self.marks:
            raise BadRecordError(f"marks {self.marks!r} are no table of seconds")
        for name, seconds in self.marks.items():
            if type(seconds) not in (int, float) or not math.isfinite(seconds) or seconds < 0:
                raise BadRecordError(f"mark {name!r}: {seconds!r} is no number of seconds")

    @classmethod
    def parse(cls, text: str) -> BootRecord:
        """Raises BadRecordError, also for what is no JSON object of these fields."""
        try:
            fields = json.loads(text)
            # A newer shim may have more to tell.
            return cls(**{name: fields[name] for name in cls.__slots__ if name in fields})
        except BadRecordError:
            raise
        except (ValueError, TypeError) as error:
            raise BadRecordError(f"no record of a start: {error}") from error


def save(record: BootRecord, directory: Path) -> None:
    """Add a start, and remove what is older than the newest `KEPT`.

    Raises:
        OSError: it can't be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / f"{record.started:020d}-{record.id}.json"
    temporary = directory / f".{path.name}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            json.dump(asdict(record), file)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for name in _names(directory)[:-KEPT]:
        with contextlib.suppress(FileNotFoundError):  # another shim does the same
            (directory / name).unlink()


def load(directory: Path) -> list[BootRecord]:
    """All starts that are kept, oldest first; files that are no record are passed over.

    Raises:
        PermissionError: it is not ours to read.
    """
    records = []
    for name in _names(directory):
        with contextlib.suppress(FileNotFoundError, BadRecordError, UnicodeDecodeError):
            records.append(BootRecord.parse((directory / name).read_text()))
    return records


def _names(directory: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(directory) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []
