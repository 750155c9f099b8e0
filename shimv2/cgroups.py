# SPDX-License-Identifier: Apache-2.0
"""The host's cgroups of a sandbox: where the VMM, its helpers and the shim live.

With ``sandbox_cgroup_only`` all of them are in one cgroup, below the one the engine made for
the pod, so that the pod's limits count.  Without it only the vCPU threads are (cgroup v1; v2
can't part a process's threads like that, there it is the VMM), and the rest lives in
``/kata_overhead/SID``, unlimited.  Neither gets limits of ours except a cpuset: memory and CPU
are limited by the engine, one level up.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_CONTROLLERS = (
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
)
_V2_CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
_THREAD_CONTROLLERS = ("cpu", "cpuacct", "cpuset")
_NO_PATH = "/kata_vc"  # parent, where the spec has no cgroupsPath
_OVERHEAD = "/kata_overhead"
_LEAF = "sandbox"
_MARK = "trusted.pykata"  # attribute of each directory that some sandbox of ours made
_REMOVE_LIMIT = 0.3  # seconds until ended processes have left their cgroup
_REMOVE_PAUSE = 0.005


class CgroupError(Exception):
    """A cgroup can't be made or used; the message names it."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted cgroup file system.

    Attributes:
        controllers: of version 1; empty for version 2.
    """

    root: Path
    controllers: frozenset[str]

    @property
    def is_v2(self) -> bool:
        return not self.controllers


@dataclass(frozen=True, slots=True)
class HostStats:
    """What a sandbox uses of the host, the guest's memory included."""

    cpu_ns: int = 0
    memory_bytes: int = 0
    processes: int = 0


def hierarchies(mountinfo: str | None = None) -> list[Hierarchy]:
    """The hierarchies a sandbox takes part in: every one with a controller of version 1, or
    else the one of version 2."""
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text()
    v1: dict[frozenset[str], Hierarchy] = {}
    v2: list[Hierarchy] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        kind, _, options = after.split()[:3] if len(after.split()) >= 3 else ("", "", "")
        root = Path(fields[4]) if len(fields) > 4 else Path("/")
        if kind == "cgroup2":
            v2.append(Hierarchy(root, frozenset()))
        elif kind == "cgroup":
            controllers = frozenset(options.split(",")) & frozenset(_CONTROLLERS)
            if controllers:
                v1.setdefault(controllers, Hierarchy(root, controllers))
    return list(v1.values()) or v2[:1]


def sandbox_path(cgroups_path: str, sandbox_id: str) -> str:
    """Path of the sandbox's cgroup below each hierarchy's root.

    Args:
        cgroups_path: ``linux.cgroupsPath``: a path, ``slice:prefix:name``, or "".
    """
    if not cgroups_path:
        return f"{_NO_PATH}/{sandbox_id}"
    if cgroups_path.count(":") == 2 and "/" not in cgroups_path:
        unit_slice, prefix, name = cgroups_path.split(":")
        unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else name
        return f"{_slice_path(unit_slice)}/{unit}"
    path = PurePosixPath("/", cgroups_path)
    if not path.name:
        return f"{_NO_PATH}/{sandbox_id}"
    return str(path.with_name(f"kata_{path.name}"))


def _slice_path(unit_slice: str) -> str:
    """``a-b.slice`` lies in ``a.slice`` (systemd.slice(5)); ``-.slice`` is the root."""
    stem = unit_slice.removesuffix(".slice")
    if stem in ("", "-"):
        return "" if stem else "/system.slice"
    parts = stem.split("-")
    return "".join(f"/{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts)))


def _in_a_unit(path: str) -> bool:
    """Whether the cgroup above `path` is one of systemd's."""
    return path.endswith(".scope") or PurePosixPath(path).parent.name.endswith(".slice")


class SandboxCgroups:
    """Both cgroups of one sandbox, in every hierarchy.

    Args:
        sandbox_id: checked to be a single path component by the caller.
        cgroups_path: of the sandbox's spec.
        sandbox_only: ``sandbox_cgroup_only`` of the configuration.
        found: hierarchies to use, for tests.
    """

    def __init__(
        self,
        sandbox_id: str,
        cgroups_path: str,
        *,
        sandbox_only: bool,
        found: Sequence[Hierarchy] | None = None,
    ) -> None:
        self._hierarchies = list(hierarchies() if found is None else found)
        self._sandbox = sandbox_path(cgroups_path, sandbox_id)
        if any(hierarchy.is_v2 for hierarchy in self._hierarchies) and _in_a_unit(self._sandbox):
            # systemd takes controllers away from what is no unit of its own, whenever it looks
            # at the slice.  The kernel lets it not, as long as a child passes them on.
            self._sandbox = f"{self._sandbox}/{_LEAF}"
        self._overhead = self._sandbox if sandbox_only else f"{_OVERHEAD}/{sandbox_id}"
        self._home: dict[Path, Path] = {}  # hierarchy → the cgroup this process came from
        self._created: list[Path] = []

    @property
    def directories(self) -> list[Path]:
        """The sandbox's own directories, to be removed by `remove` if this process can't."""
        return list(self._created)

    def create(self) -> None:
        """Make the directories.

        Raises:
            CgroupError: one can't be made; what was made is removed.
        """
        for hierarchy in self._hierarchies:
            for path in dict.fromkeys((self._sandbox, self._overhead)):
                if path == self._sandbox != self._overhead and not self._holds_threads(hierarchy):
                    continue
                try:
                    self._create_one(hierarchy, path)
                except OSError as error:
                    for directory in self.directories:
                        remove(directory)
                    self._created.clear()
                    raise CgroupError(f"cgroup {hierarchy.root}{path}: {error.strerror}") from error

    @staticmethod
    def _holds_threads(hierarchy: Hierarchy) -> bool:
        return hierarchy.is_v2 or bool(hierarchy.controllers & set(_THREAD_CONTROLLERS))

    def _create_one(self, hierarchy: Hierarchy, path: str) -> None:
        directory = hierarchy.root
        for part in PurePosixPath(path).parts[1:]:
            if hierarchy.is_v2:
                _enable_controllers(directory)
            parent, directory = directory, directory / part
            try:
                directory.mkdir(mode=0o755)
            except FileExistsError:
                if directory != hierarchy.root / path[1:]:
                    continue
            else:
                with contextlib.suppress(OSError):
                    os.setxattr(directory, _MARK, b"1")
            if "cpuset" in hierarchy.controllers:
                _inherit_cpuset(parent, directory)
        self._created.append(directory)

    def procs_files(self) -> tuple[Path, ...]:
        """Files to write the pid of the VMM and of each helper into (see `vmm` Placement)."""
        return tuple(
            self._directory(hierarchy, self._helpers(hierarchy)) / "cgroup.procs"
            for hierarchy in self._hierarchies
        )

    def add_shim(self, *, stay: bool = False) -> None:
        """Move this process in; `delete` takes it back to where it was.

        Args:
            stay: `delete` takes it to the root instead: where it was is none of its business.

        Raises:
            CgroupError: the kernel refuses.
        """
        one_thread = len(os.listdir("/proc/self/task")) == 1
        for hierarchy in self._hierarchies:
            if not stay:
                self._home[hierarchy.root] = _own_cgroup(hierarchy)
            # One thread enters without waiting for all of the kernel (see vmm.process).
            name = "tasks" if one_thread and not hierarchy.is_v2 else "cgroup.procs"
            file = self._directory(hierarchy, self._overhead) / name
            try:
                file.write_text("0")
            except OSError as error:
                raise CgroupError(f"cgroup {file}: {error.strerror}") from error

    def take_shim_home(self) -> None:
        """Move this process back to where it was before `add_shim`, as `delete` does."""
        for home in self._home.values():
            with contextlib.suppress(OSError):  # it is gone; `delete` finds another place
                (home / "cgroup.procs").write_text("0")

    def add_vcpu_threads(self, tids: Iterable[int]) -> None:
        """Move threads of the VMM to where the pod's CPU limits hold.  A thread that has ended
        is no error."""
        if self._overhead == self._sandbox:
            return
        for hierarchy in self._hierarchies:
            if hierarchy.controllers & set(_THREAD_CONTROLLERS):
                file = self._directory(hierarchy, self._sandbox) / "tasks"
                for tid in tids:
                    with contextlib.suppress(OSError):
                        file.write_text(str(tid))

    def set_cpuset(self, cpus: str, mems: str = "") -> None:
        """Confine the sandbox's vCPUs to host CPUs and memory nodes; "" stands for all that the
        cgroup above has.

        Raises:
            CgroupError: such CPUs or nodes don't exist here.
        """
        for hierarchy in self._hierarchies:
            if not hierarchy.is_v2 and "cpuset" not in hierarchy.controllers:
                continue
            directory = self._directory(hierarchy, self._sandbox)
            for name, value in (("cpuset.cpus", cpus), ("cpuset.mems", mems)):
                all_there_is = "\n"
                if not hierarchy.is_v2:  # to which an empty list is one without any
                    all_there_is = (directory.parent / name).read_text()
                try:
                    (directory / name).write_text(value or all_there_is)
                except OSError as error:
                    raise CgroupError(
                        f"cgroup {directory}/{name} = {value!r}: {error.strerror}"
                    ) from error

    def set_least_weight(self) -> None:
        """Let everybody else on the host go first, as far as the kernel offers it."""
        for hierarchy in self._hierarchies:
            directory = self._directory(hierarchy, self._sandbox)
            for name, value in (("cpu.weight", "1"), ("cpu.shares", "2"), ("blkio.weight", "10")):
                if (directory / name).exists():
                    with contextlib.suppress(OSError):
                        (directory / name).write_text(value)

    def stats(self) -> HostStats:
        """What the processes of the sandbox have used; 0 where a controller is missing."""
        cpu = memory = processes = 0
        for hierarchy in self._hierarchies:
            for path in dict.fromkeys((self._sandbox, self._overhead)):
                directory = self._directory(hierarchy, path)
                if hierarchy.is_v2:
                    cpu += _read_key(directory / "cpu.stat", "usage_usec") * 1000
                    memory += _read_int(directory / "memory.current")
                    processes += _read_int(directory / "pids.current")
                if "cpuacct" in hierarchy.controllers:
                    cpu += _read_int(directory / "cpuacct.usage")
                if "memory" in hierarchy.controllers:
                    memory += _read_int(directory / "memory.usage_in_bytes")
                if "pids" in hierarchy.controllers:
                    processes += _read_int(directory / "pids.current")
        return HostStats(cpu, memory, processes)

    def delete(self) -> list[str]:
        """Take this process and any other that is left out, and remove all directories.

        Returns:
            What could not be removed, one phrase each.  Processes have been reaped by now as a
            rule, so that nothing is waited for.
        """
        left: list[str] = []
        deadline = time.monotonic() + _REMOVE_LIMIT
        for directory in reversed(self._created):
            home = next((h for r, h in self._home.items() if directory.is_relative_to(r)), None)
            while problem := remove(directory, home):
                if time.monotonic() > deadline:
                    left.append(problem)
                    break
                # A process that is just ending; no event of either version tells when it is
                # out (cgroup.events counts it as gone before rmdir(2) does).
                time.sleep(_REMOVE_PAUSE)
        self._created.clear()
        return left

    def _helpers(self, hierarchy: Hierarchy) -> str:
        return self._sandbox if hierarchy.is_v2 else self._overhead

    @staticmethod
    def _directory(hierarchy: Hierarchy, path: str) -> Path:
        return hierarchy.root / path[1:]


def remove(directory: Path, home: Path | None = None) -> str:
    """Move what runs in a cgroup to `home` (or the root), and remove it with the parents that a
    sandbox of ours made and nobody uses any more.

    Returns:
        "" when it is gone, else the reason.
    """
    target = home if home is not None and home.is_dir() else _root_of(directory)
    try:
        for pid in (directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                (target / "cgroup.procs").write_text(pid)
    except OSError:
        pass  # the directory is gone, or no cgroup
    try:
        directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"cgroup {directory}: {error.strerror}"
    for parent in directory.parents:
        try:
            os.getxattr(parent, _MARK)
            parent.rmdir()
        except OSError:
            break
    return ""


def _root_of(directory: Path) -> Path:
    root = directory.parent
    while not root.exists():
        root = root.parent
    device = root.stat().st_dev
    while root.parent != root and root.parent.stat().st_dev == device:
        root = root.parent
    return root


def _own_cgroup(hierarchy: Hierarchy) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if frozenset(controllers.split(",")) & hierarchy.controllers or (
            hierarchy.is_v2 and not controllers
        ):
            return hierarchy.root / path.lstrip("/")
    return hierarchy.root


def _inherit_cpuset(parent: Path, directory: Path) -> None:
    """A new cpuset of version 1 is empty and takes no process."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (directory / name).read_text().strip():
            (directory / name).write_text((parent / name).read_text())


def _enable_controllers(directory: Path) -> None:
    """Pass controllers on to the children, as far as the kernel lets us."""
    try:
        there = (directory / "cgroup.controllers").read_text().split()
        passed = (directory / "cgroup.subtree_control").read_text().split()
    except OSError:
        return
    for name in _V2_CONTROLLERS:
        if name in there and name not in passed:
            with contextlib.suppress(OSError):
                (directory / "cgroup.subtree_control").write_text(f"+{name}")


def _read_int(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _read_key(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
