# SPDX-License-Identifier: Apache-2.0
"""The base root: Debian packages unpacked, thinned out and compiled; without the agent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from guestbuild import digest, elf, static_program, tree, wheel
from guestbuild.command import run
from guestbuild.description import Description
from guestbuild.errors import BuildError
from guestbuild.progress import Progress
from guestbuild.sources import Archive
from guestbuild.unpack import unpack

LIBRARY = "/usr/lib/pykata"  # our packages and their dependencies, in the guest
# Mount points that the agent needs on the read-only root.
_DIRECTORIES = ("/dev", "/proc", "/sys", "/run", "/tmp", "/var", "/mnt", "/root", "/etc", LIBRARY)


class Root:
    """A cached base root: `tree/` and `packages.json`."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self._record = folder / "packages.json"

    def packages(self) -> dict[str, str]:
        """Versions of what is in it, by package name (wheels as `pypi:NAME`, static programs
        as `static:NAME`)."""
        found: dict[str, str] = json.loads(self._record.read_text())
        return found

    def complete(self) -> bool:
        return self._record.exists()

    def finish(self, packages: dict[str, str]) -> None:
        self._record.write_text(json.dumps(packages, indent=1, sort_keys=True) + "\n")


def python_version(root: Path) -> str:
    """The guest's Python, such as `3.13`.

    Raises:
        BuildError: There is not exactly one.
    """
    found = [
        match[1]
        for path in (root / "usr/bin").glob("python3.*")
        if (match := re.fullmatch(r"python(3\.\d+)", path.name))
    ]
    if len(found) != 1:
        raise BuildError(f"the guest needs exactly one Python, not {found or 'none'}")
    return found[0]


def interpreter(root: Path) -> list[str | Path]:
    """Words that run the guest's own Python in its root.

    The hash seed is fixed, as the order of a set's members is written into bytecode. (`-I` would
    have the variable ignored.)
    """
    python = f"/usr/bin/python{python_version(root)}"
    environment = ["/usr/bin/env", "-i", "PYTHONHASHSEED=0", "LC_ALL=C.UTF-8"]
    return [*environment, "/usr/sbin/chroot", root, python, "-sSP"]


def compile_tree(root: Path, folder: str) -> None:
    """Compile a folder's Python to bytecode, by the guest's own interpreter.

    The pycs are of the unchecked-hash kind: a start never looks at a source's time or content.
    Forced, since what the compiler itself imports it has just compiled in the other way.
    """
    options = ["-q", "-f", "--invalidation-mode", "unchecked-hash", "-x", r"/tests?/|/lib2to3/"]
    run([*interpreter(root), "-m", "compileall", *options, folder])


def build(
    description: Description,
    archive: Archive,
    cache: Path,
    progress: Progress,
    *,
    refresh: bool,
    jobs: int,
) -> Root:
    """The base root of a description; from the cache if it is there."""
    programs = [
        (program, static_program.build(program, archive, cache, progress, jobs))
        for program in description.static
    ]
    key = digest.of_value(
        [
            *(archive.lines, description.packages, description.wheels, description.directories),
            *(description.symlinks, description.remove, description.keep, description.drop_needed),
            description.applets,
            [(program.target, digest.of_file(path)) for program, path in programs],
            digest.of_builder("root", "unpack", "tree", "wheel", "elf"),
        ]
    )
    folder = cache / "roots" / key
    root = Root(folder)
    if root.complete() and not refresh:
        progress.note(f"base root {key}: as built before")
        return root
    work = folder.with_name(folder.name + ".new")
    for old in (work, folder):
        if old.exists():
            shutil.rmtree(old)
    work.mkdir(parents=True)
    fresh = Root(work)
    with progress.step(f"base root: {len(description.packages)} packages of {description.suite}"):
        packages = _unpack(description, archive, fresh.tree)
    with progress.step("base root: wheels, removals, bytecode"):
        python = python_version(fresh.tree)
        library = fresh.tree / LIBRARY.lstrip("/")
        library.mkdir(parents=True, exist_ok=True)
        for path in wheel.fetch(description.wheels, python, cache):
            wheel.unpack(path, library)
            name, number = wheel.version(path)
            packages[f"pypi:{name}"] = number
        for name, unused in description.drop_needed:
            _drop_needed(tree.inside(fresh.tree, name), unused)
        tree.prune(fresh.tree, description.remove, description.keep)
        for directory in (*_DIRECTORIES, *description.directories):
            tree.inside(fresh.tree, directory).mkdir(parents=True, exist_ok=True)
        for link, target in description.symlinks:
            place = tree.inside(fresh.tree, link)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(target)
        for program, path in programs:
            place = tree.inside(fresh.tree, program.target)
            shutil.copyfile(path, place)
            place.chmod(0o755)
            packages[f"static:{program.source}"] = program.version
        if description.applets is not None:
            _link_applets(fresh.tree, description.applets)
        # The loader's index of libraries; without it each start of a program looks for them.
        run(["/sbin/ldconfig", "-X", "-r", fresh.tree])
        shutil.rmtree(fresh.tree / "var/cache", ignore_errors=True)
        compile_tree(fresh.tree, f"/usr/lib/python{python}")
        compile_tree(fresh.tree, LIBRARY)
    fresh.finish(packages)
    work.rename(folder)
    return root


def _unpack(description: Description, archive: Archive, target: Path) -> dict[str, str]:
    """Unpack the packages; returns the versions of all that came, by name."""
    listing = target.parent / "archives.txt"
    hook = f'--extract-hook=cd "$1"/var/cache/apt/archives && ls *.deb > {listing}'
    unpack(description.packages, archive, target, hook)
    return dict(_deb_name(name) for name in listing.read_text().split())


def _link_applets(root: Path, program: str) -> None:
    """Link the names under which a program such as busybox does different things to it."""
    names = run(["/usr/sbin/chroot", root, program, "--list"]).split()
    folders = [root / "usr/bin", root / "usr/sbin"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not any((folder / name).is_symlink() or (folder / name).exists() for folder in folders):
            (folders[0] / name).symlink_to(program)


def _drop_needed(path: Path, library: str) -> None:
    try:
        path.write_bytes(elf.drop_needed(path.read_bytes(), library))
    except (OSError, ValueError) as error:
        raise BuildError(f"drop_needed: {path.name}: {error}") from error


def _deb_name(file_name: str) -> tuple[str, str]:
    """`libc6_2.41-12_amd64.deb` to (`libc6`, `2.41-12`)."""
    name, version, _ = file_name.split("_")
    return name, version.replace("%3a", ":")
