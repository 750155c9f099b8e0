# SPDX-License-Identifier: Apache-2.0
"""nerdctl, built from its Go module, on a containerd whose host is a network of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from integration.lib.containerd import Containerd
from integration.lib.go_tools import go
from integration.lib.host_network import HostNetwork
from integration.lib.images import cache_dir

NERDCTL_VERSION = "v2.2.1"
_MODULE = f"github.com/containerd/nerdctl/v2@{NERDCTL_VERSION}"
_CNI_PLUGINS = Path("/usr/lib/cni")


class NoNerdctl(Exception):
    """Its source can't be had here."""


def nerdctl() -> Path:
    """The program; built on first use, which takes minutes.

    Raises:
        NoNerdctl: the Go proxy of this host has not got the module.
        RuntimeError: it does not build, or there is no usable Go.
    """
    path = cache_dir() / "go" / f"nerdctl-{NERDCTL_VERSION}" / "nerdctl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "GOTOOLCHAIN": "auto", "GOFLAGS": ""}
    found = subprocess.run(
        [go(), "mod", "download", "-json", _MODULE],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    about = json.loads(found.stdout or "{}")
    if found.returncode or "Dir" not in about:
        raise NoNerdctl(about.get("Error", found.stderr)[-500:])
    # Helpers of its tests lie among its commands, and need a module that is not in the proxy.
    source = path.parent / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(about["Dir"], source)
    subprocess.run(["chmod", "-R", "u+w", source], check=True)
    for helper in source.glob("cmd/nerdctl/helpers/testing*.go"):
        helper.unlink()
    missing = source / "mod/tigron/go.mod"
    missing.parent.mkdir(parents=True, exist_ok=True)
    missing.write_text("module github.com/containerd/nerdctl/mod/tigron\n\ngo 1.24\n")
    print(f"building nerdctl {NERDCTL_VERSION} into {path.parent} …", file=sys.stderr, flush=True)
    built = subprocess.run(
        [go(), "build", "-trimpath", "-o", path.parent / "new", "./cmd/nerdctl"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(source)
    if built.returncode:
        raise RuntimeError(f"nerdctl does not build:\n{built.stderr[-4000:]}")
    (path.parent / "new").rename(path)
    return path


class Nerdctl:
    """Commands for one containerd.

    Args:
        directory: for nerdctl's own data and CNI configuration.
    """

    def __init__(
        self, program: Path, containerd: Containerd, network: HostNetwork, directory: Path
    ) -> None:
        self._command: list[str | Path] = [
            *network.launcher,
            *(program, "--address", containerd.address, "--data-root", directory),
            *("--cni-path", _CNI_PLUGINS, "--cni-netconfpath", directory / "cni"),
        ]

    def run(
        self, *words: str, stdin: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`nerdctl WORDS`.

        Raises:
            RuntimeError: it failed, with what it said; only with `check`.
        """
        done = subprocess.run(
            [*self._command, *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"nerdctl {' '.join(words)}: {done.returncode}: {done.stderr}")
        return done
