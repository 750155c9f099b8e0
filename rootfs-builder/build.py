#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the guest's kernel and root image from Debian packages.

The result lies in the output folder: `vmlinux`, `kata-containers.img` (or
`kata-containers-initrd.img`) and `kata-containers.json`, which tells what is in them. Everything
is kept in a cache by digest of its inputs, so that a second call takes no time and a changed
agent some seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from guestbuild import dependencies, description  # noqa: E402 (the path comes first)
from guestbuild.builder import Builder, Options  # noqa: E402
from guestbuild.errors import BuildError  # noqa: E402
from guestbuild.progress import Progress  # noqa: E402


def default_cache() -> Path:
    """$PYKATA_CACHE, or `pykata` in the user's cache folder."""
    if own := os.environ.get("PYKATA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pykata"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="build.py", description=summary, epilog=rest)
    option = parser.add_argument
    option("--config", type=Path, default=HERE / "guest.yaml", metavar="YAML", help="description")
    option(
        "--kernel",
        choices=("build", "debian", "none"),
        default="build",
        help="build a small one (default), take Debian's cloud kernel, or make none",
    )
    option("--format", choices=("image", "initrd"), default="image", help="of the root")
    option("--output", type=Path, default=HERE.parent / "build/guest", metavar="DIR")
    option("--cache", type=Path, default=default_cache(), metavar="DIR")
    option("--mirror", metavar="URI", help="Debian mirror (default: the one this host's apt uses)")
    option("--refresh", action="store_true", help="look for newer packages")
    option("--jobs", type=int, default=0, metavar="N", help="compilers at a time (default: cores)")
    option("--quiet", action="store_true", help="show nothing but errors")
    return parser.parse_args(words)


def main() -> int:
    arguments = parse()
    progress = Progress(quiet=arguments.quiet)
    try:
        dependencies.check(arguments.kernel)
        guest = description.load(arguments.config)
        options = Options(
            kernel=arguments.kernel,
            format=arguments.format,
            output=arguments.output,
            cache=arguments.cache,
            mirror=arguments.mirror,
            refresh=arguments.refresh,
            jobs=arguments.jobs,
        )
        record = Builder(guest, options, progress).build()
    except BuildError as error:
        print(f"rootfs-builder: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rootfs-builder: interrupted", file=sys.stderr)
        return 130
    if not arguments.quiet:
        size = int(str(record["size"])) / 1e6
        print(f"{arguments.output}/{record['file']}: {size:.1f} MB, sha256 {record['sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
