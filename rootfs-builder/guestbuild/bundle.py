# SPDX-License-Identifier: Apache-2.0
"""The agent's part of the guest's root: its packages compiled, and the program that is PID 1."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from guestbuild import digest, root, startup, tree
from guestbuild.description import Agent, Description
from guestbuild.errors import BuildError

_LEFT_OUT = {"tests", "__pycache__"}


def sources(agent: Agent) -> Iterator[tuple[str, Path]]:
    """(path in the library, path on the host) of the agent's Python files.

    Raises:
        BuildError: A package isn't there, or the module of the entry.
    """
    for package in agent.packages:
        folder = agent.path.joinpath(*package.split("."))
        if not folder.is_dir():
            raise BuildError(f"agent.packages: {folder} is no folder")
        for path in tree.walk(folder):
            name = path.relative_to(agent.path)
            if path.suffix == ".py" and not _LEFT_OUT.intersection(name.parts):
                yield str(name), path
    module = agent.path.joinpath(*agent.entry.partition(":")[0].split("."))
    if not module.with_suffix(".py").is_file() and not (module / "__init__.py").is_file():
        raise BuildError(f"agent.entry: {module}.py does not exist")


def key(description: Description) -> str:
    """Digest of the agent's sources and of the extra files."""
    files = list(sources(description.agent))
    for extra in description.files:
        if extra.source.is_dir():
            below = [path for path in tree.walk(extra.source) if path.is_file()]
            files += [(f"{extra.target}/{path.relative_to(extra.source)}", path) for path in below]
        else:
            files.append((extra.target, extra.source))
    modes = [[extra.target, extra.mode] for extra in description.files]
    agent = description.agent
    options = [agent.entry, agent.packages, agent.keep_sources, modes]
    return digest.of_value(
        [
            digest.of_tree(files),
            options,
            digest.of_builder("bundle", "launcher", "startup", "guest/loader", "guest/collect"),
        ]
    )


def install(description: Description, target: Path) -> None:
    """Put the agent, PID 1 and the extra files into a root (a copy of the base root)."""
    agent = description.agent
    library = target / root.LIBRARY.lstrip("/")
    for name, path in sources(agent):
        place = library / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        place.chmod(0o644)
    for package in sorted({package.partition(".")[0] for package in agent.packages}):
        root.compile_tree(target, f"{root.LIBRARY}/{package}")
        if not agent.keep_sources:
            _only_bytecode(library / package)
    startup.write(target, agent)
    for extra in description.files:
        _copy(extra.source, tree.inside(target, extra.target), extra.mode)


def _copy(source: Path, target: Path, mode: int | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        return
    target.unlink(missing_ok=True)  # it may be a hard link into the base root
    shutil.copyfile(source, target)
    target.chmod(mode if mode is not None else source.stat().st_mode & 0o777)


def _only_bytecode(folder: Path) -> None:
    """Replace each source by its pyc, which the interpreter also finds beside no source."""
    for source in list(folder.rglob("*.py")):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        os.replace(compiled, source.with_suffix(".pyc"))
        source.unlink()
