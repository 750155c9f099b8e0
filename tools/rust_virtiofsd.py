# SPDX-License-Identifier: Apache-2.0
"""Puts the virtiofsd in Rust into the cache, for the tests: ``tools/rust_virtiofsd.py CACHE``.

Debian 12 has the one in C only.  Debian 13's is unpacked with the libraries it is linked with,
and run by their loader, so that nothing of the host is touched.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rootfs-builder"))

from guestbuild import sources
from guestbuild.apt import Apt
from guestbuild.command import run
from guestbuild.errors import BuildError
from guestbuild.lock import locked
from guestbuild.progress import Progress

PROGRAM = "virtiofsd"
WRAPPER = """\
#!/bin/sh
exec {root}/usr/lib64/ld-linux-x86-64.so.2 --library-path {root}/usr/lib/x86_64-linux-gnu \\
    {root}/usr/libexec/virtiofsd "$@"
"""


@dataclasses.dataclass(frozen=True)
class Debian:
    """Where the packages are from."""

    suite: str = "trixie"
    components: tuple[str, ...] = ("main",)
    mirror: str | None = None
    security_mirror: str | None = None


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit status."""
    if len(arguments) != 1:
        print("usage: rust_virtiofsd.py CACHE", file=sys.stderr)
        return 2
    cache = Path(arguments[0]).resolve()
    try:
        with locked(cache, PROGRAM, progress := Progress()):
            if not (cache / PROGRAM / PROGRAM).exists():
                with progress.step(f"{PROGRAM} in Rust, of {Debian.suite}"):
                    _make(cache)
    except BuildError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _make(cache: Path) -> None:
    apt = Apt(sources.archive(Debian()), cache)
    if not apt.ready():
        apt.update()
    target = cache / PROGRAM
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{PROGRAM}-") as scratch:
        made = Path(scratch, "made")
        for package in (PROGRAM, *apt.depends(PROGRAM)):
            deb = apt.download(apt.candidate(package), Path(scratch))
            run(["dpkg-deb", "--extract", deb, made])
        wrapper = made / PROGRAM
        wrapper.write_text(WRAPPER.format(root=target))
        wrapper.chmod(0o755)
        made.rename(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
