#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lists the Debian packages that a build still needs on this host; with --install, installs them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from guestbuild import dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", choices=("build", "debian", "none"), default="build")
    parser.add_argument("--install", action="store_true", help="install them by apt-get")
    arguments = parser.parse_args()
    packages = dependencies.missing(arguments.kernel)
    if not packages:
        print("rootfs-builder: nothing is missing")
        return 0
    command = dependencies.install_command(packages)
    print(f"rootfs-builder: missing: {' '.join(packages)}")
    if not arguments.install:
        print(f"run: {command}")
        return 1
    return subprocess.call(command.split())


if __name__ == "__main__":
    sys.exit(main())
