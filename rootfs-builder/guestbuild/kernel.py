# SPDX-License-Identifier: Apache-2.0
"""A small kernel built from Debian's kernel source, a few patches and configuration fragments."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from guestbuild import digest
from guestbuild.apt import Apt, Candidate
from guestbuild.command import run
from guestbuild.description import Kernel
from guestbuild.errors import BuildError
from guestbuild.progress import Progress

# Files that a build of the default configuration compiles: what 100 % of the progress is.
_EXPECTED_OBJECTS = 1650
_COMPILED = re.compile(r"^\s+(CC|AS)\s")
# The build's name, time and place go into the kernel; fixed, so that the same inputs give the
# same bytes.
_FIXED = ["KBUILD_BUILD_TIMESTAMP=@0", "KBUILD_BUILD_USER=pykata", "KBUILD_BUILD_HOST=pykata"]


@dataclasses.dataclass(frozen=True)
class BuiltKernel:
    """A kernel at hand. `initrd` is there only for one whose drivers are modules."""

    vmlinux: Path
    version: str
    config_digest: str
    initrd: Path | None = None


def parse_config(lines: Iterable[str]) -> dict[str, str]:
    """Options of a configuration or fragment: `y`, `n`, a number or a quoted text."""
    options: dict[str, str] = {}
    for line in lines:
        if match := re.match(r"(CONFIG_\w+)=(.*)$", line.strip()):
            options[match[1]] = match[2]
        elif match := re.match(r"# (CONFIG_\w+) is not set$", line.strip()):
            options[match[1]] = "n"
    return options


def merge(fragments: Iterable[Path]) -> dict[str, str]:
    """Options of all fragments; a later one wins."""
    merged: dict[str, str] = {}
    for fragment in fragments:
        merged.update(parse_config(fragment.read_text().splitlines()))
    return merged


def unmet(wanted: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    """Options that the configuration system did not take over (a dependency is missing)."""
    return [
        f"{name}={value} (is {actual.get(name, 'n')})"
        for name, value in wanted.items()
        if actual.get(name, "n") != value
    ]


def build(
    kernel: Kernel, apt: Apt, source: Candidate, cache: Path, progress: Progress, jobs: int
) -> BuiltKernel:
    """Build a kernel, or take it from the cache.

    Raises:
        BuildError: A patch doesn't apply; an option of a fragment doesn't take effect; the
            compiler fails.
    """
    options = merge(kernel.fragments)
    config_digest = digest.of_value(options)
    compiler = run(["gcc", "--version"]).splitlines()[0]
    patches = [digest.of_file(patch) for patch in kernel.patches]
    key = digest.of_value([source.name, source.version, patches, config_digest, compiler])
    folder = cache / "kernel" / key
    result = BuiltKernel(folder / "vmlinux", source.version, config_digest)
    if result.vmlinux.exists():
        progress.note(f"kernel {source.version} {key}: as built before")
        return result
    with progress.step(f"kernel source {source.version}: download"):
        package = apt.download(source, cache / "debs")
    (cache / "work").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache / "work", prefix="kernel-") as scratch:
        tree = _unpack(package, Path(scratch), progress)
        for patch in kernel.patches:
            apply_patch(patch, tree)
        objects = Path(scratch) / "objects"
        objects.mkdir()
        make: list[str | Path] = ["make", "-C", tree, f"O={objects}", *_FIXED]
        _configure(make, objects, options)
        compiled = 0

        def count(line: str) -> None:
            nonlocal compiled
            if _COMPILED.match(line):
                compiled += 1
                progress.percent(compiled, _EXPECTED_OBJECTS)

        with progress.step(f"kernel {source.version}: build (ten minutes or more on 2 cores)"):
            log = cache / "logs" / f"kernel-{key}.log"
            run([*make, f"-j{jobs}", "vmlinux"], on_line=count, log=log)
        built = folder.with_name(folder.name + ".new")
        shutil.rmtree(built, ignore_errors=True)
        built.mkdir(parents=True)
        run(["strip", "--strip-all", "-o", built / "vmlinux", objects / "vmlinux"])
        shutil.copyfile(objects / ".config", built / "config")
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)
    return result


def _unpack(package: Path, scratch: Path, progress: Progress) -> Path:
    """Unpack a linux-source package's tarball; returns the source tree."""
    with progress.step("kernel source: unpack"):
        run(["dpkg-deb", "--extract", package, scratch / "package"])
        (tarball,) = (scratch / "package/usr/src").glob("linux-source-*.tar.xz")
        run(["tar", "--extract", f"--file={tarball}", f"--directory={scratch}"])
        shutil.rmtree(scratch / "package")
        (tree,) = scratch.glob("linux-source-*")
    return tree


def apply_patch(patch: Path, tree: Path) -> None:
    """Apply a patch as `git diff` writes it.

    Raises:
        BuildError: It does not fit the source; names the patch and the place.
    """
    try:
        run(["patch", "--strip=1", "--batch", "--forward", f"--directory={tree}", "--input", patch])
    except BuildError as error:
        raise BuildError(f"{patch.name} does not fit this kernel's source: {error}") from error


def _configure(make: list[str | Path], objects: Path, options: Mapping[str, str]) -> None:
    """Write a configuration in which everything is off but what the fragments ask for."""
    wanted = objects / "wanted.config"
    wanted.write_text("".join(f"{name}={value}\n" for name, value in options.items()))
    run([*make, "allnoconfig"], env={"KCONFIG_ALLCONFIG": str(wanted)})
    actual = parse_config((objects / ".config").read_text().splitlines())
    missing = unmet(options, actual)
    if missing:
        raise BuildError("kernel options without effect:\n  " + "\n  ".join(missing))


def default_jobs() -> int:
    """As many as this process may run at a time."""
    return len(os.sched_getaffinity(0))
