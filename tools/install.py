#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Installs the runtime under a prefix, and takes it away again.

PREFIX/bin                                   launchers
PREFIX/lib/pykata                            our packages and their dependencies, compiled
PREFIX/share/kata-containers                 guest kernel and image
PREFIX/share/defaults/kata-containers        configuration.toml

PREFIX/lib/pykata/MANIFEST.json lists all that was put outside of that directory.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE))
sys.dont_write_bytecode = True

from shimv2.config import document, locate  # noqa: E402

REQUIREMENTS = TREE / "tools/requirements.txt"
PACKAGES = ("ttrpc", "vmm", "shimv2", "agent/__init__.py", "agent/api")
UNWANTED = ("tests", "conftest.py", "_tests", "__pycache__", "*.proto", "*.pyi", "*.pyc")
UNWANTED_OF_DEPENDENCIES = ("bin", "__pycache__", "tests", "_tests", "_core/_tests", "*.pyi", "*.c")
LAUNCHERS = {
    "containerd-shim-kata-v2": "shimv2.cli",
    "kata-monitor": "shimv2.monitor",
    "kata-runtime": "shimv2.runtime_cli",
    "kata-vm-cache": "shimv2.factory.service",
}
LAUNCHER = """\
#!{python} -IS
import sys

sys.path.append({lib!r})
from {module} import main

sys.exit(main())
"""
# What the guest builder calls a file, and what Kata's configuration files call it.
ASSETS = {
    "vmlinux": "vmlinux.container",
    "kata-containers.img": "kata-containers.img",
    "kata-containers-initrd.img": "kata-containers-initrd.img",
    "modules-initrd.img": "modules-initrd.img",
    "kata-containers.json": "kata-containers.json",
}
ENABLED_ANNOTATIONS = ["^default_vcpus$", "^default_memory$", "^kernel_params$", "^enable_iommu$"]


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", flush=True)


class Destination:
    """Where files go: DESTDIR + PREFIX, and a record of what was put there."""

    def __init__(self, prefix: Path, destdir: str) -> None:
        self.prefix = prefix
        self.root = Path(destdir) if destdir else Path("/")
        self.files: dict[str, str] = {}
        self.directories: list[str] = []
        self.before = self._load()

    def real(self, path: Path) -> Path:
        """Where an installed path is right now, under DESTDIR."""
        return self.root / path.relative_to("/")

    @property
    def lib(self) -> Path:
        return self.prefix / "lib/pykata"

    @property
    def manifest(self) -> Path:
        return self.real(self.lib / "MANIFEST.json")

    def _load(self) -> dict[str, dict[str, str]]:
        try:
            loaded: dict[str, dict[str, str]] = json.loads(self.manifest.read_text())
        except FileNotFoundError:
            return {"files": {}, "directories": {}}
        return loaded

    def make_directory(self, path: Path) -> None:
        """Like mkdir -p; a directory that was not there is ours to remove."""
        missing = []
        while not self.real(path).exists():
            missing.append(path)
            path = path.parent
        for directory in reversed(missing):
            self.real(directory).mkdir()
            self.real(directory).chmod(0o755)
            self.directories.append(str(directory))

    def put(self, path: Path, source: Path | str, mode: int = 0o644) -> None:
        """Write one file in a single step: a text, or a copy of a file."""
        self.make_directory(path.parent)
        target = self.real(path)
        if target.exists() and str(path) not in self.before["files"]:
            raise FileExistsError(f"{target} is there and was not put there by this installer")
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as new:
            try:
                if isinstance(source, str):
                    new.write(source.encode())
                else:
                    with source.open("rb") as old:
                        shutil.copyfileobj(old, new, 1 << 20)
                new.flush()
                os.chmod(new.name, mode)
                os.replace(new.name, target)
            except BaseException:
                os.unlink(new.name)
                raise
        self.files[str(path)] = digest(target)

    def put_unless_changed(self, path: Path, text: str) -> None:
        """A configuration file: one that is not as we left it stays, ours goes beside it."""
        target = self.real(path)
        known = self.before["files"].get(str(path))
        if not target.exists() or digest(target) == known:
            self.put(path, text)
            return
        beside = path.with_name(path.name + ".new")
        say(f"{target} is not as installed and stays; the new one is {beside.name}")
        self.put(beside, text)
        if known is not None:
            self.files[str(path)] = known

    def write_manifest(self) -> None:
        """Record what was put where; what only an earlier install had put is removed."""
        for old, known in self.before["files"].items():
            if old not in self.files:
                remove(self.real(Path(old)), known)
        directories = dict.fromkeys([*self.before["directories"], *self.directories], "")
        record = {"files": self.files, "directories": directories}
        self.manifest.write_text(json.dumps(record, indent=1) + "\n")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path, known: str) -> None:
    """Remove a file that is as we left it."""
    if not path.exists():
        return
    if path.suffix == ".toml" and digest(path) != known:
        say(f"{path} was edited and stays")
        return
    path.unlink()


def dependencies_name(python: str) -> str:
    """A name that changes with the list of dependencies and with the interpreter's version."""
    command = [python, "-IS", "-c", "import sys; print(sys.implementation.cache_tag)"]
    tag = subprocess.run(command, capture_output=True, check=True).stdout.strip()
    return hashlib.sha256(REQUIREMENTS.read_bytes() + tag).hexdigest()[:16]


def dependencies(python: str, build: Path) -> Path:
    """A directory with the run-time dependencies, made once per list and interpreter."""
    made = build / "deps" / dependencies_name(python)
    if made.is_dir():
        return made
    say("downloading " + ", ".join(requirement_names()))
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        target = Path(scratch) / "lib"
        command = [python, "-m", "pip", "install", "--target", str(target)]
        command += ["--quiet", "--no-compile", "--only-binary=:all:", "--root-user-action=ignore"]
        subprocess.run([*command, "--requirement", str(REQUIREMENTS)], check=True)
        os.replace(target, made)
    return made


def requirement_names() -> list[str]:
    """The lines of the list without comments."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]


def copy_library(destination: Destination, python: str, build: Path) -> None:
    """Packages and dependencies, compiled, put in place in one step."""
    lib = destination.lib
    destination.make_directory(lib.parent)
    final = destination.real(lib)
    new, old = final.with_name("pykata.new"), final.with_name("pykata.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(
        dependencies(python, build), new, ignore=shutil.ignore_patterns(*UNWANTED_OF_DEPENDENCIES)
    )
    for package in PACKAGES:
        source = TREE / package
        if source.is_dir():
            shutil.copytree(
                source, new / package, ignore=shutil.ignore_patterns(*UNWANTED), dirs_exist_ok=True
            )
        else:
            (new / package).parent.mkdir(exist_ok=True)
            shutil.copy(source, new / package)
    (new / "COMMIT").write_text(current_commit() + "\n")
    shutil.copy(TREE / "LICENSE", new / "LICENSE")
    if not compileall.compile_dir(new, ddir=str(lib), quiet=1, workers=1):
        raise SystemExit("some modules do not compile")
    for path in (new, *new.rglob("*")):
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def current_commit() -> str:
    """The commit of the tree, with a + when files differ from it; "" outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(TREE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (TREE / ".git").exists() or not shutil.which("git"):
        return ""
    return git("rev-parse", "--short=12", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def configuration(destination: Destination, installed: set[str]) -> str:
    """configuration.toml with the paths of this prefix and this host."""
    share = destination.prefix / "share/kata-containers"
    qemu = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
    daemons = [str(path) for path in locate.VIRTIOFSD_PATHS]
    found = locate.default_virtiofsd(destination.prefix)
    hypervisor = {
        "path": qemu,
        "valid_hypervisor_paths": [qemu],
        "kernel": str(share / "vmlinux.container"),
        "virtio_fs_daemon": str(found) if found.exists() else "",
        "valid_virtio_fs_daemon_paths": daemons,
        "valid_entropy_sources": ["/dev/urandom", "/dev/random"],
        "enable_annotations": ENABLED_ANNOTATIONS,
    }
    if "kata-containers.img" in installed or "kata-containers-initrd.img" not in installed:
        hypervisor |= {"image": str(share / "kata-containers.img"), "rootfs_type": "erofs"}
        if "modules-initrd.img" in installed:
            hypervisor["modules_initrd"] = str(share / "modules-initrd.img")
    else:
        hypervisor["initrd"] = str(share / "kata-containers-initrd.img")
    # Kata's default is off, and a Kata user's own file keeps it; who installs ours has it on.
    factory = {"enable_template": True}
    return document.sample({"hypervisor.qemu": hypervisor, "factory": factory})


def check_python(python: str) -> None:
    """Say what is missing before anything is touched."""
    code = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if "No module named" in done.stderr:
        raise SystemExit(f"error: {python} has no pip: apt-get install python3-pip")
    if done.returncode:
        raise SystemExit(f"error: {python} does not run or is older than 3.11: {done.stderr}")


def install(options: argparse.Namespace) -> None:
    """Put everything in place."""
    check_python(options.python)
    began = time.monotonic()
    destination = Destination(options.prefix, options.destdir)
    destination.root.mkdir(parents=True, exist_ok=True)
    print(f"installing under {destination.real(options.prefix)}", flush=True)
    copy_library(destination, options.python, options.build)
    for name, module in LAUNCHERS.items():
        text = LAUNCHER.format(python=options.python, lib=str(destination.lib), module=module)
        destination.put(options.prefix / "bin" / name, text, 0o755)
    installed = set()
    for source, name in ASSETS.items():
        if (options.guest / source).exists():
            say(f"guest: {name}")
            destination.put(options.prefix / "share/kata-containers" / name, options.guest / source)
            installed.add(name)
    destination.put_unless_changed(
        options.prefix / "share/defaults" / locate.RELATIVE, configuration(destination, installed)
    )
    destination.write_manifest()
    print(f"installed in {time.monotonic() - began:.1f} s", flush=True)
    if not {"vmlinux.container", "kata-containers.img"} <= installed:
        print(f"note: no guest in {options.guest}; build it with: make guest", flush=True)


def uninstall(options: argparse.Namespace) -> None:
    """Take away what `install` put there."""
    destination = Destination(options.prefix, options.destdir)
    if not destination.manifest.exists():
        print(f"nothing is installed under {destination.real(options.prefix)}")
        return
    for path, known in destination.before["files"].items():
        remove(destination.real(Path(path)), known)
    shutil.rmtree(destination.real(destination.lib))
    for directory in sorted(destination.before["directories"], key=len, reverse=True):
        try:
            destination.real(Path(directory)).rmdir()
        except OSError:  # not empty: holds something of someone else
            continue
    print(f"removed from {destination.real(options.prefix)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="install or remove the runtime")
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--prefix", type=Path, default=Path("/usr/local"))
    parser.add_argument("--destdir", default="")
    parser.add_argument("--guest", type=Path, default=TREE / "build/guest")
    parser.add_argument("--build", type=Path, default=TREE / "build")
    parser.add_argument("--python", default="/usr/bin/python3")
    options = parser.parse_args()
    if not options.prefix.is_absolute():
        parser.error(f"--prefix {options.prefix}: not an absolute path")
    if options.destdir and not Path(options.destdir).is_absolute():
        options.destdir = os.path.abspath(options.destdir)
    try:
        install(options) if options.action == "install" else uninstall(options)
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]} failed with status {error.returncode}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
