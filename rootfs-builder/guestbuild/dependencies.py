# SPDX-License-Identifier: Apache-2.0
"""Programs and headers that a build needs on the host, and the Debian packages they are in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from guestbuild.errors import BuildError

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
# What is looked for (a program, or a file's path) and the package that has it.
_IMAGE = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "zstd": "zstd",
    "lz4": "lz4",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
_KERNEL = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "patch": "patch",
    "strip": "binutils",
    "perl": "perl",
    "/usr/include/gelf.h": "libelf-dev",
    "/usr/include/x86_64-linux-gnu/openssl/opensslconf.h": "libssl-dev",
}
_DEBIAN_KERNEL = {"xz": "xz-utils"}


def missing(kernel: str) -> list[str]:
    """Debian packages to install for a build with this kind of kernel (build, debian, none)."""
    wanted = dict(_IMAGE)
    if kernel == "build":
        wanted |= _KERNEL
    elif kernel == "debian":
        wanted |= _DEBIAN_KERNEL
    return sorted({package for need, package in wanted.items() if not _present(need)})


def check(kernel: str) -> None:
    """Raise a BuildError that names what to install, if anything is missing."""
    packages = missing(kernel)
    if packages:
        raise BuildError(f"missing on this host. Run: {install_command(packages)}")
    if os.geteuid() != 0:
        raise BuildError("the guest's root is unpacked with its owners and modes: run as root")


def install_command(packages: Iterable[str]) -> str:
    return "apt-get install --no-install-recommends -y " + " ".join(packages)


def _present(need: str) -> bool:
    if need.startswith("/"):
        return Path(need).exists()
    return shutil.which(need, path=_PATH) is not None
