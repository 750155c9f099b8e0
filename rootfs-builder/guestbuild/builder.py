# SPDX-License-Identifier: Apache-2.0
"""The whole build: kernel, base root, agent, image; and the JSON that tells what is in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from guestbuild import bundle, digest, image, kernel, root, sources, tree
from guestbuild.apt import Apt, Candidate
from guestbuild.debian_kernel import take
from guestbuild.description import Description
from guestbuild.kernel import BuiltKernel
from guestbuild.lock import locked
from guestbuild.padding import without_padding
from guestbuild.progress import Progress

IMAGE = "kata-containers.img"
INITRD = "kata-containers-initrd.img"
MODULES_INITRD = "modules-initrd.img"
RECORD = "kata-containers.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a call of the builder asks for."""

    kernel: str = "build"  # build, debian, none
    format: str = "image"  # image, initrd
    output: Path = Path("build/guest")
    cache: Path = Path("~/.cache/pykata")
    mirror: str | None = None
    refresh: bool = False
    jobs: int = 0


class Builder:
    """Makes a guest by a description. Results are kept in the cache by digest of their inputs."""

    def __init__(self, description: Description, options: Options, progress: Progress) -> None:
        self._description = description
        self._options = options
        self._progress = progress
        self._cache = options.cache.expanduser().resolve()
        self._archive = sources.archive(description, mirror=options.mirror)

    def build(self) -> dict[str, object]:
        """Build what is missing, put the result into the output folder and return its record.

        Raises:
            BuildError: Any step failed; what was in the output folder stays as it was.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        with locked(self._cache, "kernel", self._progress):
            # A build that was killed leaves its objects, half a gigabyte.
            for left in (self._cache / "work").glob("*"):
                shutil.rmtree(left, ignore_errors=True)
            built = self._kernel()
        with locked(self._cache, "root", self._progress):
            return self._root(built)

    def _root(self, built: BuiltKernel | None) -> dict[str, object]:
        base = root.build(
            *(self._description, self._archive, self._cache, self._progress),
            refresh=self._options.refresh,
            jobs=self._jobs,
        )
        inputs = {
            "root": base.packages(),
            "base": base.tree.parent.name,
            "agent": bundle.key(self._description),
            "image": dataclasses.asdict(self._description.image),
            "format": self._options.format,
            "builder": digest.of_builder("image", "mbr", "cpio"),
        }
        folder = self._cache / "guest" / digest.of_value(inputs)
        if not (folder / RECORD).exists():
            self._pack(base, folder)
        record: dict[str, object] = json.loads((folder / RECORD).read_text())
        files = {str(record["file"]): (folder / str(record["file"])).read_bytes()}
        if built is not None:
            files["vmlinux"] = vmlinux = without_padding(built.vmlinux.read_bytes())
            if built.initrd is not None:
                files[MODULES_INITRD] = built.initrd.read_bytes()
            record["kernel"] = {
                "kind": self._options.kernel,
                "version": built.version,
                "config_digest": built.config_digest,
                "sha256": hashlib.sha256(vmlinux).hexdigest(),
                "size": len(vmlinux),
            }
        self._publish(files, record)
        return record

    def _kernel(self) -> BuiltKernel | None:
        if self._options.kernel == "none":
            return None
        apt = Apt(self._archive, self._cache)
        wanted = self._description.kernel
        name = wanted.source if self._options.kernel == "build" else wanted.debian_image
        candidate = self._candidate(apt, name)
        if self._options.kernel == "debian":
            return take(wanted, apt, candidate, self._cache, self._progress)
        return kernel.build(wanted, apt, candidate, self._cache, self._progress, self._jobs)

    @property
    def _jobs(self) -> int:
        return self._options.jobs or kernel.default_jobs()

    def _candidate(self, apt: Apt, package: str) -> Candidate:
        """The package's version as first looked up; looked up again only by `--refresh`."""
        note = self._cache / "apt" / f"{digest.of_value([self._archive.lines, package])}.json"
        if note.exists() and not self._options.refresh:
            return Candidate(**json.loads(note.read_text()))
        with self._progress.step(f"package lists of {self._archive.suite}"):
            apt.update()
        candidate = apt.candidate(package)
        note.write_text(json.dumps(dataclasses.asdict(candidate)))
        return candidate

    def _pack(self, base: root.Root, folder: Path) -> None:
        name = IMAGE if self._options.format == "image" else INITRD
        work = self._cache / "guest"
        work.mkdir(parents=True, exist_ok=True)
        with (
            self._progress.step(f"agent and {name}"),
            tempfile.TemporaryDirectory(dir=work, prefix="new-") as scratch,
        ):
            target = Path(scratch) / "root"
            tree.copy_linked(base.tree, target)
            bundle.install(self._description, target)
            result = Path(scratch) / "result"
            result.mkdir()
            write = image.write_image if name == IMAGE else image.write_initrd
            write(target, result / name, self._description.image)
            packages = base.packages()
            record = {
                "format": self._options.format,
                "file": name,
                "sha256": digest.of_file(result / name),
                "size": (result / name).stat().st_size,
                "unpacked_size": tree.size(target),
                "inputs": folder.name,
                "suite": self._description.suite,
                "python": root.python_version(target),
                "protobuf": packages.get("pypi:protobuf") or packages.get("python3-protobuf"),
                "compression": self._description.image.compression,
                "packages": packages,
            }
            (result / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            result.rename(folder)

    def _publish(self, files: dict[str, bytes], record: dict[str, object]) -> None:
        """Write the results into the output folder; each file appears whole or not at all."""
        output = self._options.output
        output.mkdir(parents=True, exist_ok=True)
        if "kernel" in record:
            if MODULES_INITRD not in files:
                (output / MODULES_INITRD).unlink(missing_ok=True)
        elif (output / RECORD).exists():  # the kernel made before stays, and what is told of it
            before = json.loads((output / RECORD).read_text())
            if "kernel" in before:
                record["kernel"] = before["kernel"]
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        for name, data in {**files, RECORD: text.encode()}.items():
            _replace(output / name, data)


def _replace(target: Path, data: bytes) -> None:
    """Write a file anew; a running VM goes on with the one that it has open."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.write_bytes(data)
    temporary.replace(target)
