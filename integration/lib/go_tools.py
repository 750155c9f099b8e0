# SPDX-License-Identifier: Apache-2.0
"""containerd 2.x and its friends, built from their Go modules into the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from integration.lib.containerd import Edition
from integration.lib.images import cache_dir

CONTAINERD_VERSION = "v2.4.2"
CRI_TOOLS_VERSION = "v1.37.0"
_NEEDS_GO = (1, 26)
_MODULE = "github.com/containerd/containerd/v2/cmd"


def containerd_edition() -> Edition:
    """containerd of CONTAINERD_VERSION; built on first use, which takes minutes.

    Raises:
        RuntimeError: there is no usable Go.
    """
    directory = cache_dir() / "go" / f"containerd-{CONTAINERD_VERSION}"
    edition = Edition("go", directory)
    programs = ("containerd", "ctr", "containerd-shim-runc-v2")
    missing = [name for name in programs if not (directory / name).exists()]
    if missing:
        install([f"{_MODULE}/{name}@{CONTAINERD_VERSION}" for name in missing], directory)
    return edition


def crictl() -> Path:
    """crictl of CRI_TOOLS_VERSION; built on first use.

    Raises:
        RuntimeError: there is no usable Go.
    """
    directory = cache_dir() / "go" / f"cri-tools-{CRI_TOOLS_VERSION}"
    if not (directory / "crictl").exists():
        install([f"sigs.k8s.io/cri-tools/cmd/crictl@{CRI_TOOLS_VERSION}"], directory)
    return directory / "crictl"


def critest() -> Path:
    """critest of CRI_TOOLS_VERSION, which is test code and can't be installed; built on first use.

    Raises:
        RuntimeError: there is no usable Go.
    """
    path = cache_dir() / "go" / f"cri-tools-{CRI_TOOLS_VERSION}" / "critest"
    if not path.exists():
        crictl()  # brings the module's source
        module = f"sigs.k8s.io/cri-tools@{CRI_TOOLS_VERSION}"
        source = _run([go(), "mod", "download", "-json", module], cwd=path.parent)
        directory = json.loads(source)["Dir"]
        print(f"building critest into {path.parent} …", file=sys.stderr, flush=True)
        _run([go(), "test", "-c", "-o", str(path), "./cmd/critest"], cwd=Path(directory))
    return path


def _run(command: list[str], cwd: Path) -> str:
    environment = {**os.environ, "GOTOOLCHAIN": "auto", "GOFLAGS": ""}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def install(packages: list[str], directory: Path) -> None:
    """`go install` into `directory`, with a line on stderr since it takes a while."""
    directory.mkdir(parents=True, exist_ok=True)
    print(f"building {' '.join(packages)} into {directory} …", file=sys.stderr, flush=True)
    environment = {**os.environ, "GOBIN": str(directory), "GOTOOLCHAIN": "auto", "GOFLAGS": ""}
    done = subprocess.run(
        [go(), "install", "-trimpath", *packages],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"go install failed:\n{done.stderr[-4000:]}")


def go() -> str:
    """The Go command; an older one than needed fetches its successor by itself (GOTOOLCHAIN)."""
    found = shutil.which("go") or next(
        (path for path in ("/usr/local/go/bin/go", "/usr/lib/go/bin/go") if Path(path).exists()), ""
    )
    if not found:
        raise RuntimeError("Go is missing: apt-get install golang-go, or put go on PATH")
    text = subprocess.run([found, "version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"go(\d+)\.(\d+)", text)
    version = tuple(map(int, match.groups())) if match else (0, 0)
    # GOTOOLCHAIN came with Go 1.21; before it an old Go can't fetch a new one.
    if version < (1, 21):
        raise RuntimeError(f"{text.strip()} is too old: Go 1.21 or later is needed")
    return found
