# SPDX-License-Identifier: Apache-2.0
"""guest.yaml: what is in a guest, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from guestbuild.errors import BuildError

COMPRESSIONS = ("none", "lz4", "lz4hc", "zstd")


@dataclasses.dataclass(frozen=True)
class ExtraFile:
    """A file or folder of the host copied into the guest."""

    source: Path
    target: str
    mode: int | None = None


@dataclasses.dataclass(frozen=True)
class StaticProgram:
    """A program built static from a Debian source package."""

    source: str
    version: str
    sha256: str  # of the .orig tarball
    target: str
    file: str  # the program in the source tree, once built
    packages: tuple[str, ...] = ()
    configure: tuple[str, ...] = ()
    make: tuple[str, ...] = ()
    objects: int = 100  # what 100 % of the progress is

    @property
    def name(self) -> str:
        return self.target.rpartition("/")[2]

    def as_list(self) -> list[object]:
        """All that its bytes depend on."""
        return [self.source, self.sha256, self.file, self.packages, self.configure, self.make]


@dataclasses.dataclass(frozen=True)
class Agent:
    """Where the agent's packages lie and which function is PID 1."""

    path: Path
    packages: tuple[str, ...] = ("agent", "ttrpc")
    entry: str = "agent.main:main"
    keep_sources: bool = True


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel built from a Debian source package, patches and configuration fragments."""

    source: str = "linux-source-6.12"
    patches: tuple[Path, ...] = ()
    fragments: tuple[Path, ...] = ()
    debian_image: str = "linux-image-cloud-amd64"
    modules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Image:
    """How the root is packed."""

    compression: str = "none"
    uuid: str = "00000000-0000-4000-8000-000000000001"
    initrd_compression: str = "zstd"


@dataclasses.dataclass(frozen=True)
class Description:
    """A guest.yaml, with its paths made absolute (relative ones are meant from its folder)."""

    path: Path
    packages: tuple[str, ...]
    agent: Agent
    kernel: Kernel
    image: Image = Image()
    suite: str = "trixie"
    components: tuple[str, ...] = ("main",)
    mirror: str | None = None
    security_mirror: str | None = None
    static: tuple[StaticProgram, ...] = ()
    wheels: tuple[str, ...] = ()
    drop_needed: tuple[tuple[str, str], ...] = ()
    files: tuple[ExtraFile, ...] = ()
    directories: tuple[str, ...] = ()
    symlinks: tuple[tuple[str, str], ...] = ()
    applets: str | None = None
    remove: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


def load(path: Path) -> Description:
    """Read a description.

    Raises:
        BuildError: Missing file, invalid YAML, an unknown key (with the nearest known one), a
            value of a wrong type, a missing source.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BuildError(f"{path}: not valid YAML: {error}") from error
    return _Reader(path.resolve()).description(data)


class _Reader:
    """Turns parsed YAML into a Description; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent

    def description(self, data: object) -> Description:
        top = self._mapping(data, "", Description, never={"path"})
        suite = self._text(top.get("suite", "trixie"), "suite")
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", suite):
            self._fail("suite", f"{suite!r} is no suite's name")
        return Description(
            path=self._path,
            suite=suite,
            packages=self._texts(top.get("packages"), "packages"),
            components=self._texts(top.get("components", ["main"]), "components"),
            mirror=self._optional(top.get("mirror"), "mirror"),
            security_mirror=self._optional(top.get("security_mirror"), "security_mirror"),
            static=tuple(self._static(top.get("static", []))),
            wheels=self._texts(top.get("wheels", []), "wheels"),
            drop_needed=tuple(
                (self._guest_path(path, "drop_needed"), self._text(name, f"drop_needed.{path}"))
                for path, name in self._mapping(top.get("drop_needed", {}), "drop_needed").items()
            ),
            files=tuple(self._files(top.get("files", []))),
            directories=self._guest_paths(top.get("directories", []), "directories"),
            symlinks=tuple(
                (self._guest_path(link, "symlinks"), self._text(target, f"symlinks.{link}"))
                for link, target in self._mapping(top.get("symlinks", {}), "symlinks").items()
            ),
            applets=self._applets(top.get("applets")),
            remove=self._guest_paths(top.get("remove", []), "remove"),
            keep=self._guest_paths(top.get("keep", []), "keep"),
            agent=self._agent(top.get("agent")),
            kernel=self._kernel(top.get("kernel", {})),
            image=self._image(top.get("image", {})),
        )

    def _static(self, data: object) -> list[StaticProgram]:
        if not isinstance(data, list):
            self._fail("static", "must be a list")
        result = []
        for entry in data:
            found = self._mapping(entry, "static", StaticProgram)
            sha256 = self._text(found.get("sha256"), "static.sha256")
            if not re.fullmatch(r"[0-9a-f]{64}", sha256):
                self._fail("static.sha256", f"{sha256!r} is not 64 hex digits")
            objects = found.get("objects", StaticProgram.objects)
            if not isinstance(objects, int) or objects < 1:
                self._fail("static.objects", f"must be a number above 0, not {objects!r}")
            result.append(
                StaticProgram(
                    source=self._text(found.get("source"), "static.source"),
                    version=self._text(found.get("version"), "static.version"),
                    sha256=sha256,
                    target=self._guest_path(found.get("target"), "static.target"),
                    file=self._text(found.get("file"), "static.file"),
                    packages=self._texts(found.get("packages", []), "static.packages"),
                    configure=self._texts(found.get("configure", []), "static.configure"),
                    make=self._texts(found.get("make", []), "static.make"),
                    objects=objects,
                )
            )
        return result

    def _agent(self, data: object) -> Agent:
        found = self._mapping(data, "agent", Agent)
        agent = Agent(
            path=self._host_path(found.get("path"), "agent.path"),
            packages=self._texts(found.get("packages", list(Agent.packages)), "agent.packages"),
            entry=self._text(found.get("entry", Agent.entry), "agent.entry"),
            keep_sources=self._flag(found.get("keep_sources", True), "agent.keep_sources"),
        )
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", agent.entry):
            self._fail("agent.entry", f"{agent.entry!r} is not MODULE:FUNCTION")
        return agent

    def _kernel(self, data: object) -> Kernel:
        found = self._mapping(data, "kernel", Kernel)
        return Kernel(
            source=self._text(found.get("source", Kernel.source), "kernel.source"),
            patches=self._matches(found.get("patches", []), "kernel.patches"),
            fragments=self._matches(found.get("fragments", []), "kernel.fragments"),
            debian_image=self._text(
                found.get("debian_image", Kernel.debian_image), "kernel.debian_image"
            ),
            modules=self._texts(found.get("modules", []), "kernel.modules"),
        )

    def _image(self, data: object) -> Image:
        found = self._mapping(data, "image", Image)
        image = Image(
            compression=self._text(found.get("compression", "none"), "image.compression"),
            uuid=self._text(found.get("uuid", Image.uuid), "image.uuid"),
            initrd_compression=self._text(
                found.get("initrd_compression", "zstd"), "image.initrd_compression"
            ),
        )
        for key in ("compression", "initrd_compression"):
            if getattr(image, key) not in COMPRESSIONS:
                self._fail(f"image.{key}", f"must be one of {', '.join(COMPRESSIONS)}")
        return image

    def _files(self, data: object) -> list[ExtraFile]:
        if not isinstance(data, list):
            self._fail("files", "must be a list")
        result = []
        for entry in data:
            found = self._mapping(entry, "files", ExtraFile)
            mode = found.get("mode")
            if isinstance(mode, str) and re.fullmatch(r"0?[0-7]{3,4}", mode):
                mode = int(mode, 8)
            elif mode is not None and not isinstance(mode, int):
                self._fail("files.mode", 'must be octal, such as "0755"')
            result.append(
                ExtraFile(
                    source=self._host_path(found.get("source"), "files.source"),
                    target=self._guest_path(found.get("target"), "files.target"),
                    mode=mode,
                )
            )
        return result

    def _mapping(
        self,
        data: object,
        key: str,
        shape: type | None = None,
        *,
        never: set[str] | None = None,
    ) -> Mapping[str, Any]:
        if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
            self._fail(key or "the file", "must be a mapping of keys to values")
        if shape is not None:
            known = {field.name for field in dataclasses.fields(shape)} - (never or set())
            for name in data:
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    hint = f" (did you mean {near[0]}?)" if near else ""
                    self._fail(f"{key}.{name}".lstrip("."), f"unknown key{hint}")
        return data

    def _text(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not value:
            self._fail(key, f"must be text, not {value!r}")
        return value

    def _optional(self, value: object, key: str) -> str | None:
        return None if value is None else self._text(value, key)

    def _flag(self, value: object, key: str) -> bool:
        if not isinstance(value, bool):
            self._fail(key, f"must be true or false, not {value!r}")
        return value

    def _texts(self, value: object, key: str) -> tuple[str, ...]:
        if not isinstance(value, list):
            self._fail(key, "must be a list of texts")
        return tuple(self._text(item, key) for item in value)

    def _guest_path(self, value: object, key: str) -> str:
        text = self._text(value, key)
        if not text.startswith("/") or ".." in text.split("/"):
            self._fail(key, f"{text!r} must be an absolute path in the guest without ..")
        return text

    def _applets(self, value: object) -> str | None:
        return None if value is None else self._guest_path(value, "applets")

    def _guest_paths(self, value: object, key: str) -> tuple[str, ...]:
        return tuple(self._guest_path(item, key) for item in self._texts(value, key))

    def _matches(self, patterns: object, key: str) -> tuple[Path, ...]:
        """Files of the host, those of one pattern in the order of their names."""
        found: list[Path] = []
        for pattern in self._texts(patterns, key):
            matches = sorted(Path(name) for name in glob.glob(str(self._folder / pattern)))
            found += matches or [self._host_path(pattern, key)]
        return tuple(found)

    def _host_path(self, value: object, key: str) -> Path:
        path = (self._folder / self._text(value, key)).resolve()
        if not path.exists():
            self._fail(key, f"{path} does not exist")
        return path

    def _fail(self, key: str, text: str) -> NoReturn:
        raise BuildError(f"{self._path}: {key}: {text}")
