# SPDX-License-Identifier: Apache-2.0
"""What of a sandbox lies on the host's file system, and how to end it from outside.

``delete`` is a fresh process: all that it knows is here.  A record names processes by pid
*and* start time, so that a recycled pid is never killed.
"""

from __future__ import annotations

import os
import time

from shimv2 import light_json

TYPE_CHECKING = False
if TYPE_CHECKING:  # `start` and `delete` are faster without typing, pathlib and socket
    from pathlib import Path
    from typing import Any

SANDBOXES = "/run/vc/sbs"
VMS = "/run/vc/vm"
SHARES = "/run/kata-containers/shared/sandboxes"
MANAGEMENT_SOCKET = "shim-monitor.sock"
READY_SHIMS = "/run/vc/ready-shims"
"""Sockets by which `start` gets a shim that was made ahead (`shimv2.ready`)."""
DIRECT_VOLUMES = "/run/kata-containers/shared/direct-volumes"
"""Kata's place for what CSI drivers note of their volumes (`shimv2.direct_volumes`)."""

_CGROUP_LIMIT = 0.5  # seconds
_KILL_LIMIT = 4.0  # containerd gives `delete` 5 s in all


def sandbox_dir(sandbox_id: str) -> Path:
    """The shim's own state: state.json."""
    return _path(SANDBOXES, sandbox_id)


def management_socket(sandbox_id: str) -> Path:
    """Where the shim answers HTTP."""
    return sandbox_dir(sandbox_id) / MANAGEMENT_SOCKET


def vm_dir(sandbox_id: str) -> Path:
    """Sockets of the VMM and its helpers."""
    return _path(VMS, sandbox_id)


def share_dir(sandbox_id: str) -> Path:
    """What the guest sees through virtio-fs."""
    return _path(SHARES, sandbox_id)


def _path(*parts: str) -> Path:
    from pathlib import Path

    return Path(*parts)


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    # The command name may hold spaces and parentheses; field 22 counts from its last ")".
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


class SandboxRecord:
    """``/run/vc/sbs/SID/state.json``, written by the shim, read by whoever cleans up.

    Attributes:
        namespace, containerd: whose sandbox it is (containerd's namespace and address).
        socket: path of the shim's ttrpc socket.
        processes: name → (pid, start time) of the shim and each helper.
        cgroups: directories to remove at the end, innermost first.
        netns: path and inode of the pod's network namespace.
        pod: name, namespace and uid in Kubernetes, by these words; empty outside of it.
        traces: what of us stands in there, as in `shimv2.network.traces.Trace`.
    """

    def __init__(self, sandbox_id: str, namespace: str, containerd: str, socket_path: str) -> None:
        self.sandbox_id = sandbox_id
        self.namespace = namespace
        self.containerd = containerd
        self.socket = socket_path
        self.processes: dict[str, tuple[int, int]] = {}
        self.cgroups: list[str] = []
        self.netns: tuple[str, int] = ("", 0)
        self.pod: dict[str, str] = {}
        self.traces: list[tuple[str, int, str]] = []

    @property
    def path(self) -> str:
        return _record_path(self.sandbox_id)

    def add_process(self, name: str, pid: int) -> None:
        """Remember a process under `name`; one that is gone already is left out."""
        started = start_time(pid)
        if started is not None:
            self.processes[name] = (pid, started)

    def save(self) -> None:
        """Write the record so that a reader sees the old or the new one, never a part.

        Raises:
            OSError: it can't be written; names the file.
        """
        data = {k: v for k, v in vars(self).items() if k != "sandbox_id"}
        temporary = f"{self.path.removesuffix('.json')}.tmp"
        try:
            with open(temporary, "w") as file:
                file.write(light_json.dumps(data))
        except OSError as error:  # "no space left" does not say where
            raise OSError(error.errno, error.strerror, temporary) from error
        os.rename(temporary, self.path)

    @classmethod
    def load(cls, sandbox_id: str) -> SandboxRecord | None:
        """The record of a sandbox, or None where there is none that can be read."""
        try:
            with open(_record_path(sandbox_id), "rb") as file:
                data: dict[str, Any] = light_json.loads(file.read())
            record = cls(sandbox_id, data["namespace"], data["containerd"], data["socket"])
            record.processes = {k: (int(p), int(t)) for k, (p, t) in data["processes"].items()}
            record.cgroups = [str(path) for path in data["cgroups"]]
            path, inode = data["netns"]
            record.netns = str(path), int(inode)
            record.pod = {str(k): str(v) for k, v in data["pod"].items()}
            record.traces = [(str(k), int(i), str(n)) for k, i, n in data["traces"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record

    def shim_alive(self) -> bool:
        """Whether the shim that owns this sandbox still runs."""
        pid, started = self.processes.get("shim", (0, 0))
        return pid > 0 and start_time(pid) == started


def _record_path(sandbox_id: str) -> str:
    return os.path.join(SANDBOXES, sandbox_id, "state.json")


class SandboxInUseError(Exception):
    """A running sandbox has this id already, in another namespace or containerd."""


class _Exclusive:
    """Nobody else claims or removes a sandbox meanwhile.

    One lock for all ids: it is held for milliseconds, or while what a killed shim left is ended,
    which takes seconds at the most.
    """

    def __enter__(self) -> None:
        import fcntl

        try:
            self._fd = os.open(SANDBOXES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # nobody has claimed anything yet
            self._fd = -1
        else:
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def claim(record: SandboxRecord) -> None:
    """Make the sandbox's state directory ours.  What a dead shim left is cleared first.

    Raises:
        SandboxInUseError: a living shim owns the id.
        OSError: it can't be written, or what was there not be removed; names the file, and
            nothing of ours is left.
    """
    os.makedirs(SANDBOXES, mode=0o700, exist_ok=True)
    directory = os.path.dirname(record.path)
    with _Exclusive():
        other = SandboxRecord.load(record.sandbox_id)
        if other is not None and other.shim_alive():
            raise SandboxInUseError(
                f"sandbox id {record.sandbox_id!r} is in use by namespace "
                f"{other.namespace!r} of containerd at {other.containerd!r}"
            )
        if os.path.exists(directory) and (left := _remove(record.sandbox_id)):
            import errno

            raise OSError(errno.EBUSY, f"a dead shim's, and can't go: {'; '.join(left)}", directory)
        os.mkdir(directory, mode=0o700)
        try:
            record.save()
        except OSError:
            _remove(record.sandbox_id)
            raise


def kill_processes(processes: dict[str, tuple[int, int]], limit: float = _KILL_LIMIT) -> list[str]:
    """SIGKILL each process that still is the one recorded, and wait for its end.

    Returns:
        The names of those that live on after `limit` seconds (uninterruptible in the kernel).
    """
    import select
    import signal

    open_fds: dict[int, str] = {}
    poller = select.poll()
    # The shim first: its helpers die with it, and it can start no new one.
    for name, (pid, started) in sorted(processes.items(), key=lambda item: item[0] != "shim"):
        if pid == os.getpid():
            continue
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue
        if start_time(pid) != started:
            os.close(fd)
            continue
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        poller.register(fd, select.POLLIN)
        open_fds[fd] = name
    deadline = time.monotonic() + limit
    while open_fds and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(left * 1000):
            poller.unregister(fd)
            os.close(fd)
            del open_fds[fd]
    for fd in open_fds:
        os.close(fd)
    return list(open_fds.values())


def remove_sandbox(sandbox_id: str, namespace: str) -> list[str]:
    """End whatever is left of a sandbox and remove its files.  Idempotent.

    Args:
        namespace: whose sandbox it is; one of the same id that another has by now is let be.

    Returns:
        What could not be removed, one phrase each.
    """
    with _Exclusive():
        record = SandboxRecord.load(sandbox_id)
        if record is not None and record.namespace != namespace:
            return []
        return _remove(sandbox_id)


def _remove(sandbox_id: str) -> list[str]:
    left: list[str] = []
    record = SandboxRecord.load(sandbox_id)
    if record is not None:
        left += [f"process {name}" for name in kill_processes(record.processes)]
        if record.cgroups:
            left += _remove_cgroups(record.cgroups)
        if record.traces:
            left += _remove_traces(record)
        if record.socket:
            remove_socket(record.socket)
    for directory in (vm_dir(sandbox_id), share_dir(sandbox_id), sandbox_dir(sandbox_id)):
        left += remove_tree(directory)
    if os.path.isdir(DIRECT_VOLUMES):
        from shimv2 import direct_volumes

        direct_volumes.forget_sandbox(sandbox_id)
    return left


def _remove_cgroups(paths: list[str]) -> list[str]:
    """A process that was killed can keep its cgroup busy for a moment after its end."""
    from shimv2 import cgroups

    deadline = time.monotonic() + _CGROUP_LIMIT
    while True:
        left = [text for path in paths if (text := cgroups.remove(_path(path)))]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _remove_traces(record: SandboxRecord) -> list[str]:
    from shimv2.network.traces import Trace, undo_in

    path, inode = record.netns
    try:
        undo_in(path, inode, [Trace(*trace) for trace in record.traces])
    except OSError as error:
        return [f"in network namespace {path}: {error}"]
    return []


def remove_socket(path: str) -> None:
    """Remove a unix socket unless somebody listens there again."""
    import socket

    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        _path(path).unlink(missing_ok=True)
    except OSError:
        pass
    # else: a successor of ours listens there, so it stays


def remove_tree(directory: Path) -> list[str]:
    """Remove a directory tree without ever crossing a mount: those are detached first."""
    if not directory.exists():
        return []
    import errno

    _detach_mounts_below(directory)
    left: list[str] = []
    device = directory.lstat().st_dev
    for root, names, files in os.walk(directory, topdown=False):
        for name in files + names:
            path = _path(root, name)
            try:
                if path.lstat().st_dev != device:
                    left.append(f"{path}: still mounted")
                elif path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    left.append(f"{path}: {error.strerror}")
    try:
        directory.rmdir()
    except OSError as error:
        left.append(f"{directory}: {error.strerror}")
    return left


def _detach_mounts_below(directory: Path) -> None:
    mounted = []
    prefix = str(directory)
    for line in _path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split(" ", 5)[4].encode().decode("unicode_escape")
        if point == prefix or point.startswith(prefix + "/"):
            mounted.append(point)
    if mounted:
        from shimv2.mounts import umount_detached

        for point in reversed(mounted):
            umount_detached(_path(point))
