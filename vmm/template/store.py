# SPDX-License-Identifier: Apache-2.0
"""Where templates lie on the host, and when one may be used.

Below the store's directory, `KEY` being a VM's fingerprint::

    KEY/state KEY/memory      what the driver saved
    KEY/template.json         what belongs to it: written last, so that a half-made one has none
    KEY.new/                  one being made
    KEY.lock                  locked (flock) by who makes it, whose pid it holds
    KEY.failed                why making it failed; its age keeps others from trying at once

A template appears by a rename, complete.  Who clones holds its directory open: one that is
removed or replaced meanwhile fails in time or is copied whole, never mixed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import select
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmm import identity

log = logging.getLogger(__name__)

STATE_FILE = "state"
MEMORY_FILE = "memory"
ABOUT_FILE = "template.json"
FORMAT = 1

RETRY_AFTER = 600.0
"""Seconds before a template whose making failed is tried again."""
KEEP = 8
"""Templates kept; the one not used for the longest time goes first."""
KEEP_UNUSED = 7 * 24 * 3600.0
"""Seconds after which one that nobody used goes."""
_END_LIMIT = 10.0  # seconds for a maker to clean up, and again for it to die
_STATE_LIMIT = 64 << 20  # bytes; QEMU's device state without memory is a few hundred KiB
_KEY = re.compile(r"[0-9a-f]{64}")


class TemplateBusyError(Exception):
    """Another process is making this template."""


@dataclass(frozen=True, slots=True)
class Template:
    """One that was found whole.

    Attributes:
        directory: what `Hypervisor.restore` takes; good while the context that gave it is open.
        about: what was noted when it was made.
    """

    key: str
    directory: Path
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of `status`.

    Attributes:
        state: ``ready``, ``damaged``, ``being made`` or ``failed``.
        detail: why, for a damaged or failed one.
        size: bytes on the disk.
        used: seconds since the epoch when it was cloned last.
        pid: of the maker, else 0.
    """

    key: str
    state: str
    detail: str = ""
    size: int = 0
    created: float = 0.0
    used: float = 0.0
    pid: int = 0
    about: dict[str, Any] | None = None


class Making:
    """A template under construction: write into `directory`, then `publish`."""

    def __init__(self, store: TemplateStore, key: str) -> None:
        self._store = store
        self.key = key
        self.directory = store.root / f"{key}.new"

    def publish(self, about: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Make it the template of its key.

        Args:
            about: facts for people, kept beside it.
            files: what the VM was made from; once one is replaced, `tidy` removes the template.

        Raises:
            OSError: the disk is full.
        """
        memory = os.stat(self.directory / MEMORY_FILE)
        document = {
            **about,
            "format": FORMAT,
            "files": {str(path): identity.of_file(path) for path in files},
            "key": self.key,
            "created": time.time(),
            "state_sha256": _digest(self.directory / STATE_FILE),
            "memory_bytes": memory.st_size,
            "memory_blocks": memory.st_blocks,
        }
        (self.directory / ABOUT_FILE).write_text(json.dumps(document, indent=1))
        target = self._store.root / self.key
        remove_directory(target)
        self.directory.rename(target)


class TemplateStore:
    """See the module's docstring.

    Args:
        root: made (0700) when the first template is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def find(self, key: str) -> Iterator[Template | None]:
        """The template of `key`, or None.  One that is not whole is removed, with a warning."""
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        try:
            directory = Path(f"/proc/self/fd/{fd}")
            try:
                about = _check(directory, key)
            except (OSError, ValueError) as error:
                log.warning("template %s is damaged and removed: %s", key[:12], error)
                self.discard(key)
                yield None
                return
            with contextlib.suppress(OSError):
                os.utime(fd)  # "used"
            yield Template(key, directory, about)
        finally:
            os.close(fd)

    def is_wanted(self, key: str) -> bool:
        """Whether to make it now: there is none, nobody is at it, and it did not just fail."""
        if self._path(key).exists():
            return False
        try:
            age = time.time() - (self.root / f"{key}.failed").stat().st_mtime
        except OSError:
            pass
        else:
            # A clock that was set back must not block it for ever.
            if 0 <= age < RETRY_AFTER:
                return False
        return _maker(self.root / f"{key}.lock") is None

    @contextlib.contextmanager
    def make(self, key: str) -> Iterator[Making]:
        """Be the one who makes it.  Whatever is not published is gone afterwards; a failure is
        noted, and the exception goes on.

        Raises:
            TemplateBusyError: another process makes it.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(key):
            making = Making(self, key)
            failed = self.root / f"{key}.failed"
            remove_directory(making.directory)
            making.directory.mkdir(mode=0o700)
            try:
                yield making
                failed.unlink(missing_ok=True)
            except BaseException as error:
                remove_directory(making.directory)  # first: it may be what fills the disk
                if isinstance(error, Exception):
                    with contextlib.suppress(OSError):
                        failed.write_text(f"{error}\n"[:4096])
                raise
            finally:
                remove_directory(making.directory)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self.root / f"{key}.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise TemplateBusyError(f"template {key[:12]} is being made") from None
                if not _is_same(fd, path):
                    continue  # its maker has just ended and taken it away
                os.ftruncate(fd, 0)
                os.write(fd, b"%d\n" % os.getpid())
                try:
                    yield
                    return
                finally:
                    path.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def tidy(self, keep: str = "") -> None:
        """Remove templates that no VM fits any more, that nobody used for long, or that are too
        many, and what makers that were killed have left.

        Args:
            keep: a key that stays in any case.
        """
        now = time.time()
        ready = []
        for entry in self.status():
            if entry.key == keep:
                continue
            if entry.state == "ready" and not _is_stale(entry):
                ready.append(entry)
            elif entry.state in ("ready", "damaged"):
                self.discard(entry.key)
        ready.sort(key=lambda entry: entry.used, reverse=True)
        for index, entry in enumerate(ready):
            if index >= KEEP - 1 or now - entry.used > KEEP_UNUSED:
                self.discard(entry.key)
        for path in self._listing():
            key, _, end = path.name.partition(".")
            if _maker(self.root / f"{key}.lock") is not None:
                continue
            if end == "new" or end.startswith("gone."):
                remove_directory(path)
            elif end == "lock":
                path.unlink(missing_ok=True)

    def status(self) -> list[Entry]:
        """All there is, newest first."""
        entries = []
        for path in self._listing():
            key, _, end = path.name.partition(".")
            if not end:
                entries.append(_describe(path, key))
            elif end == "lock" and (pid := _maker(path)) is not None:
                with contextlib.suppress(OSError):
                    created = path.stat().st_mtime
                    entries.append(Entry(key, "being made", created=created, pid=pid))
            elif end == "failed":
                with contextlib.suppress(OSError):
                    text, created = path.read_text().strip(), path.stat().st_mtime
                    entries.append(Entry(key, "failed", text, created=created))
        return sorted(entries, key=lambda entry: entry.created, reverse=True)

    def discard(self, key: str) -> None:
        """Remove the template of `key`; without effect if there is none."""
        remove_directory(self._path(key))

    def destroy(self) -> list[int]:
        """End every maker and remove all templates.

        Returns:
            The pids of the makers that were told to end.
        """
        locks = [path for path in self._listing() if path.suffix == ".lock"]
        pids = [pid for path in locks if (pid := _end(path)) is not None]
        for path in self._listing():
            if path.is_dir():
                remove_directory(path)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()
        return pids

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a template")
        return self.root / key

    def _listing(self) -> list[Path]:
        try:
            names = sorted(os.listdir(self.root))
        except OSError:
            return []
        return [self.root / name for name in names if _KEY.fullmatch(name.partition(".")[0])]


def remove_directory(path: Path) -> None:
    """Remove a template's directory: out of sight at once, then file by file."""
    gone = path.with_name(f"{path.name[:64]}.gone.{os.urandom(4).hex()}")
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def _check(directory: Path, key: str) -> dict[str, Any]:
    """The facts about a template that is whole.

    Raises:
        OSError, ValueError: it is not, and why.
    """
    about = json.loads((directory / ABOUT_FILE).read_bytes()[: 1 << 20])
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("key") != key:
        raise ValueError(f"{ABOUT_FILE} does not belong to it")
    memory = os.stat(directory / MEMORY_FILE)
    if memory.st_size != about["memory_bytes"]:
        raise ValueError(f"its memory has {memory.st_size} bytes, not {about['memory_bytes']}")
    if _digest(directory / STATE_FILE) != about["state_sha256"]:
        raise ValueError("its state is not what was written")
    return about


def _is_stale(entry: Entry) -> bool:
    """Whether a file that the VM was made from is another one by now."""
    files = (entry.about or {}).get("files", {})
    try:
        return any(identity.of_file(Path(path)) != known for path, known in files.items())
    except OSError:
        return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _STATE_LIMIT:
            raise ValueError("its state is too large")
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: Path, key: str) -> Entry:
    try:
        size = sum(item.stat().st_blocks * 512 for item in path.iterdir())
        about = _check(path, key)
        created = float(about["created"])
        return Entry(key, "ready", "", size, created, path.stat().st_mtime, about=about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Entry(key, "damaged", str(error))


def _maker(lock: Path) -> int | None:
    """Who holds a lock file: its pid (0 in the moment before it is written), or None."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read(16).strip() or 0)
            return None
    except (OSError, ValueError):
        return None


def _end(lock: Path) -> int | None:
    """End the process that holds a lock file; returns its pid, or None if there is none."""
    pid = _maker(lock)
    if not pid:
        return None
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        if _maker(lock) != pid:  # it ended, and the pid may be another's by now
            return None
        for number, limit in ((signal.SIGTERM, _END_LIMIT), (signal.SIGKILL, _END_LIMIT)):
            signal.pidfd_send_signal(fd, number)
            if select.select([fd], [], [], limit)[0]:
                return pid
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)
    return pid


def _is_same(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
