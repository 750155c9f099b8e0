# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of a bundle: read, checked, and what the shim itself wants to know of it.

No protobuf here: ``start`` reads a spec too, and has to be fast.  What the guest gets is made
in `shimv2.guest_spec`.
"""

from __future__ import annotations

import enum
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_MAX_SIZE = 16 << 20  # bytes; real ones have some ten KiB
_MAX_SHOWN = 80  # characters of a bad value in a message

_T = TypeVar("_T")


class SpecError(ValueError):
    """A spec is broken; the message names the field and its value."""


class ContainerKind(enum.Enum):
    """What a container is to its sandbox."""

    SINGLE = "single"  # sandbox and only container in one
    SANDBOX = "sandbox"  # the pause container
    MEMBER = "container"  # joins a sandbox


class HookKind(enum.Enum):
    """Points in a container's life at which hooks run (runtime-spec, config.md#posix-platform-hooks)."""

    PRESTART = "prestart"
    CREATE_RUNTIME = "createRuntime"
    CREATE_CONTAINER = "createContainer"
    START_CONTAINER = "startContainer"
    POSTSTART = "poststart"
    POSTSTOP = "poststop"


# Engine → (key of the container's type, key of the sandbox's id)
_KIND_KEYS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id"),
)
_GROUP_KEY = "io.containerd.runc.v2.group"
_NETNS_PLACEHOLDER = re.compile(r"^/proc/0/")  # Docker: "not known yet"


class Hook:
    """A program to run at a `HookKind`; `timeout` in seconds or None."""

    __slots__ = ("args", "env", "path", "timeout")

    def __init__(self, path: str, args: list[str], env: list[str], timeout: int | None) -> None:
        self.path = path
        self.args = args
        self.env = env
        self.timeout = timeout


class Mount:
    """One entry of ``mounts``."""

    __slots__ = ("destination", "options", "source", "type")

    def __init__(self, destination: str, kind: str, source: str, options: list[str]) -> None:
        self.destination = destination
        self.type = kind
        self.source = source
        self.options = options

    @property
    def is_bind(self) -> bool:
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options

    @property
    def readonly(self) -> bool:
        """Whether writing is forbidden by the last of the options that say."""
        said = [option for option in self.options if option in ("ro", "rro", "rw")]
        return bool(said) and said[-1] != "rw"


class Spec:
    """A spec that was checked as far as the shim reads it.

    Attributes:
        json: the document as it was read; treat it as constant.
        bundle: directory it lies in.
        annotations, hostname, mounts, hooks: as in the document.
        args, terminal: of ``process``; args is empty where there is no process.
        rootfs: absolute path on the host, None where there is no ``root``.
        namespaces: type → path, "" for a new one; a type that is missing is the host's.
        cgroups_path: ``linux.cgroupsPath``, may be empty.
        sysctls: ``linux.sysctl``.
    """

    def __init__(self, document: object, bundle: Path) -> None:
        self.bundle = bundle
        self.json = _expect(document, dict, "config.json")
        root = _Node(self.json, "")
        version = root.text("ociVersion")
        if version and not re.match(r"^1\.\d+\.\d+", version):
            raise _bad("ociVersion", version, "must be 1.x.y")
        self.annotations = root.text_map("annotations")
        self.hostname = root.text("hostname")
        process = root.node("process")
        self.terminal = bool(process and process.flag("terminal"))
        self.args = process.texts("args") if process else []
        if process:
            process.texts("env")
            process.absolute("cwd")
        self.mounts = [_mount(entry) for entry in root.nodes("mounts")]
        self.hooks = _hooks(root.node("hooks"))
        self.rootfs = self._rootfs(root.node("root"))
        linux = root.node("linux") or _Node({}, "linux")
        self.cgroups_path = linux.text("cgroupsPath")
        self.sysctls = linux.text_map("sysctl")
        if "\0" in self.cgroups_path or ".." in self.cgroups_path.split("/"):
            raise _bad("linux.cgroupsPath", self.cgroups_path, "must not climb with '..'")
        self.namespaces = {
            kind: entry.absolute("path")
            for entry in linux.nodes("namespaces")
            if (kind := entry.text("type", needed=True))
        }

    def _rootfs(self, root: _Node | None) -> Path | None:
        if root is None:
            return None
        path = root.text("path", needed=True)
        root.flag("readonly")
        if not path.startswith("/") and ".." in path.split("/"):
            raise _bad("root.path", path, "leaves the bundle")
        return self.bundle / path

    def check_container(self) -> None:
        """Raises:
        SpecError: a container can't be made of it, as a sandbox may be.
        """
        if not isinstance(self.json.get("process"), dict):
            raise SpecError("process: missing")
        if not self.args or not self.args[0]:
            raise _bad("process.args", self.args, "must name a program")
        if not self.json["process"].get("cwd"):
            raise SpecError("process.cwd: missing")
        if self.rootfs is None:
            raise SpecError("root: missing")

    @property
    def kind(self) -> ContainerKind:
        for kind_key, _ in _KIND_KEYS:
            value = self.annotations.get(kind_key)
            if value in ("sandbox", "podsandbox"):
                return ContainerKind.SANDBOX
            if value == "container":
                return ContainerKind.MEMBER
            if value:
                raise _bad(f"annotations[{kind_key}]", value, "must be sandbox or container")
        return ContainerKind.SINGLE

    @property
    def sandbox_id(self) -> str:
        """Id of the sandbox a member joins, or of the pod a sandbox is; "" if not said."""
        for _, id_key in _KIND_KEYS:
            if self.annotations.get(id_key):
                return self.annotations[id_key]
        return ""

    @property
    def group(self) -> str:
        """What containers that share a shim have in common; "" if this one is by itself."""
        return self.annotations.get(_GROUP_KEY) or self.sandbox_id

    @property
    def netns(self) -> str | None:
        """Path of the network namespace; "" for a new one, None for the host's."""
        path = self.namespaces.get("network")
        return "" if path is not None and _NETNS_PLACEHOLDER.match(path) else path

    @property
    def sandbox_pidns(self) -> bool:
        """Whether it joins the pid namespace that the pod shares."""
        return bool(self.namespaces.get("pid"))

    def mount_at(self, destination: str) -> Mount | None:
        """The last mount on `destination`, None if there is none."""
        found = [m for m in self.mounts if os.path.normpath(m.destination) == destination]
        return found[-1] if found else None


def load(bundle: Path) -> Spec:
    """Read ``bundle/config.json``.

    Raises:
        FileNotFoundError: there is none, which is legal for a sandbox.
        SpecError: it can't be used, and why.
    """
    path = bundle / "config.json"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_SIZE + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    if len(data) > _MAX_SIZE:
        raise SpecError(f"{path}: more than {_MAX_SIZE >> 20} MiB")
    try:
        return Spec(parse_json(data), bundle)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def parse_json(data: bytes) -> object:
    """Raises:
    SpecError: not JSON, and where it breaks.
    """
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise SpecError(f"not JSON: {error}") from None


class _Node:
    """A JSON object and where it lies; null counts as missing, as it does for Go."""

    __slots__ = ("_object", "path")

    def __init__(self, value: object, path: str) -> None:
        self.path = path
        self._object: dict[str, Any] = _expect(value, dict, path or "config.json")

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _get(self, key: str, kind: type[_T], default: Callable[[], _T]) -> _T:
        value = self._object.get(key)
        return default() if value is None else _expect(value, kind, self._at(key))

    def text(self, key: str, *, needed: bool = False) -> str:
        value = self._get(key, str, str)
        if "\0" in value:
            raise _bad(self._at(key), value, "has a zero byte in it")
        if needed and not value:
            raise SpecError(f"{self._at(key)}: missing")
        return value

    def absolute(self, key: str, *, needed: bool = False) -> str:
        value = self.text(key, needed=needed)
        if value and not value.startswith("/"):
            raise _bad(self._at(key), value, "must be an absolute path")
        return value

    def flag(self, key: str) -> bool:
        return self._get(key, bool, bool)

    def number(self, key: str) -> int | None:
        value = self._object.get(key)
        return None if value is None else _expect(value, int, self._at(key))

    def texts(self, key: str) -> list[str]:
        values = self._get(key, list, list)
        for index, value in enumerate(values):
            if "\0" in _expect(value, str, f"{self._at(key)}[{index}]"):
                raise _bad(f"{self._at(key)}[{index}]", value, "has a zero byte in it")
        return values

    def text_map(self, key: str) -> dict[str, str]:
        values = self._get(key, dict, dict)
        for name, value in values.items():
            _expect(value, str, f"{self._at(key)}[{name}]")
        return values

    def node(self, key: str) -> _Node | None:
        value = self._object.get(key)
        return None if value is None else _Node(value, self._at(key))

    def nodes(self, key: str) -> list[_Node]:
        values = self._get(key, list, list)
        return [_Node(value, f"{self._at(key)}[{index}]") for index, value in enumerate(values)]


def _mount(entry: _Node) -> Mount:
    return Mount(
        entry.absolute("destination", needed=True),
        entry.text("type"),
        entry.text("source"),
        entry.texts("options"),
    )


def _hooks(hooks: _Node | None) -> dict[HookKind, list[Hook]]:
    found: dict[HookKind, list[Hook]] = {kind: [] for kind in HookKind}
    if hooks is not None:
        for kind, listed in found.items():
            listed.extend(_hook(entry) for entry in hooks.nodes(kind.value))
    return found


def _hook(entry: _Node) -> Hook:
    timeout = entry.number("timeout")
    if timeout is not None and timeout <= 0:
        raise _bad(f"{entry.path}.timeout", timeout, "must be greater than zero")
    path = entry.absolute("path", needed=True)
    return Hook(path, entry.texts("args") or [path], entry.texts("env"), timeout)


_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "a bool"}


def _expect(value: object, kind: type[_T], path: str) -> _T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _bad(path, value, f"must be {_NAMES[kind]}")
    return value


def _bad(path: str, value: object, why: str) -> SpecError:
    shown = json.dumps(value, default=str)
    if len(shown) > _MAX_SHOWN:
        shown = shown[:_MAX_SHOWN] + "…"
    return SpecError(f"{path}: {why}, is {shown}")
