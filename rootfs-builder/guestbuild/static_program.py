# SPDX-License-Identifier: Apache-2.0
"""Programs built static from Debian's source packages.

A dynamic program pays for its libraries at each start, and where the CPU is emulated it pays most
of its time for them; crun is started for every call that the agent makes.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from guestbuild import digest
from guestbuild.apt import Apt
from guestbuild.command import run
from guestbuild.description import StaticProgram
from guestbuild.errors import BuildError
from guestbuild.progress import Progress
from guestbuild.sources import Archive
from guestbuild.unpack import unpack

# What any configure script and Makefile needs; a program's own libraries come from its description.
_TOOLS = (
    *("base-files", "dash", "coreutils", "sed", "grep", "mawk", "diffutils"),
    *("gcc", "libc6-dev", "make", "pkgconf"),
)
_ENVIRONMENT = (
    "PATH=/usr/bin:/usr/sbin",
    "LC_ALL=C.UTF-8",
    "SOURCE_DATE_EPOCH=0",
    "CFLAGS=-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2",
)
_COMPILED = re.compile(r"^\s+CC\s")


def build(
    program: StaticProgram, archive: Archive, cache: Path, progress: Progress, jobs: int
) -> Path:
    """Build a program, or take it from the cache; returns its path.

    Raises:
        BuildError: The source is not the one that the description names, or it does not build.
    """
    builder = digest.of_builder("static_program", "unpack")
    key = digest.of_value([program.as_list(), archive.suite, builder])
    result = cache / "static" / key / program.name
    if result.exists():
        return result
    (cache / "static").mkdir(parents=True, exist_ok=True)
    for left in (cache / "static").glob("new-*"):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache / "static", prefix="new-") as scratch:
        root = Path(scratch) / "root"
        with progress.step(f"{program.name}: source and compiler"):
            tarball = _source(program, archive, cache, Path(scratch))
            _unpack_tools(program, archive, root)
            tree = root / "build" / program.name
            tree.mkdir(parents=True)
            run(["tar", "--extract", f"--file={tarball}", f"--directory={tree}", "--strip=1"])
        compiled = 0

        def count(line: str) -> None:
            nonlocal compiled
            if _COMPILED.match(line):
                compiled += 1
                progress.percent(compiled, program.objects)

        inside: list[str | Path] = ["/usr/sbin/chroot", root, "/usr/bin/env", "-i", *_ENVIRONMENT]
        inside += ["/bin/sh", "-ec", 'cd "$1"; shift; exec "$@"', "sh", f"/build/{program.name}"]
        log = cache / "logs" / f"{program.name}-{key}.log"
        with progress.step(f"{program.name}: build"):
            run([*inside, "./configure", *program.configure], log=log)
            run([*inside, "make", f"-j{jobs}", *program.make], on_line=count, log=log)
        run([*inside, "strip", "--strip-all", "-o", "/build/stripped", program.file])
        new = Path(scratch) / "result"
        new.mkdir()
        (root / "build/stripped").rename(new / program.name)
        shutil.rmtree(result.parent, ignore_errors=True)
        new.rename(result.parent)
    return result


def _source(program: StaticProgram, archive: Archive, cache: Path, scratch: Path) -> Path:
    """The source package's tarball as its authors released it, checked against the description."""
    known = cache / "sources" / program.sha256
    if known.exists():
        return known
    apt = Apt(archive.with_sources(), cache)
    apt.update()
    tarball = apt.source(program.source, scratch)
    if (found := digest.of_file(tarball)) != program.sha256:
        raise BuildError(
            f"static: {tarball.name} has the SHA-256 {found}, the description wants "
            f"{program.sha256} for {program.version}: {archive.suite} has another version of "
            f"{program.source} by now. Look at what changed, then change the description"
        )
    known.parent.mkdir(parents=True, exist_ok=True)
    return tarball.rename(known)


def _unpack_tools(program: StaticProgram, archive: Archive, root: Path) -> None:
    """A root with a compiler, of the same suite as the guest."""
    unpack((*_TOOLS, *program.packages), archive, root)
    (root / "usr/bin/awk").symlink_to("mawk")  # else made by a maintainer script
