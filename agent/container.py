# SPDX-License-Identifier: Apache-2.0
"""A container: its bundle, and crun, which does the work.

Methods that take time are generators for the agent's loop.
"""

from __future__ import annotations

import os

from agent import log, oom, spec
from agent import stats as cgroup_stats
from agent.process import Process, TerminalSocket
from agent.spawn import spawn
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from agent.api import agent_pb2, oci_pb2
    from agent.sandbox import Sandbox

CRUN = "/usr/bin/crun"
CRUN_STATE = "/run/crun"
BUNDLES = "/run/kata-containers"
CGROUPS = "/sys/fs/cgroup"

_SIGKILL, _SIGTERM = 9, 15
_EXEC_LIMIT = 4096
_LINGER = 10.0  # seconds for an ended exec's output to be read by calls
_KILL_ROUNDS = 16
_LOG_TAIL = 4096  # bytes of crun's log that an error reads


class Container:
    """One container in the guest.

    Attributes:
        init: its first process.
        execs: further processes by exec id, until somebody has waited for them.
        storages: the mount points it holds.
        submounts: the directories of the share that it holds.
        termination_log: path in the guest of what the container leaves as its last words.
    """

    def __init__(self, sandbox: Sandbox, container_id: str, init: Process, cgroup: str) -> None:
        self.id = container_id
        self.init = init
        self.execs: dict[str, Process] = {}
        self.cgroup = cgroup
        self.storages: list[str] = []
        self.submounts: list[str] = []
        self.bundle = f"{BUNDLES}/{container_id}"
        self.running = False
        self.termination_log = ""
        self._poststart = False  # crun has hooks to run at its start
        self._sandbox = sandbox
        self._oom: oom.OomWatch | None = None

    # --- life ---------------------------------------------------------------------------

    def create(self, document: dict[str, Any]) -> Generator[Any, Any, None]:
        """Write the bundle and let crun make the container, up to just before its program.

        Raises:
            RpcError: INTERNAL with crun's own words.
        """
        os.makedirs(self.bundle, mode=0o700, exist_ok=True)
        _write_json(f"{self.bundle}/config.json", document)
        self._poststart = bool(document.get("hooks", {}).get("poststart"))
        yield from self._start_process(self.init, ["create", "--bundle", self.bundle])
        self._oom = oom.watch(self._sandbox.loop, self.cgroup, self._oom_happened)

    def start(self) -> Generator[Any, Any, None]:
        """Let the program run."""
        if self.running:
            raise RpcError(Code.FAILED_PRECONDITION, f"container {self.id!r} was started already")
        self.running = True  # at once: another call must not start it meanwhile
        try:
            if self._poststart or not self._let_go():
                yield from self._crun("start", self.id)
        except RpcError:
            self.running = False
            raise

    def _let_go(self) -> bool:
        """What `crun start` does where there are no hooks: a byte for the FIFO that init reads.

        A process for that is ten times the work (status.c, libcrun_status_write_exec_fifo).

        Returns:
            False if there is nobody to let go; crun says why.
        """
        fifo = f"{CRUN_STATE}/{self.id}/exec.fifo"
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # init has ended, so that nobody reads
            return False
        try:
            os.unlink(fifo)  # by which crun tells a created container from a running one
            os.write(fd, b"\0")
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def execute(self, process: Process, oci: oci_pb2.Process) -> Generator[Any, Any, None]:
        """Run one more process in it.

        Raises:
            RpcError: ALREADY_EXISTS, FAILED_PRECONDITION, or INTERNAL with crun's words.
        """
        known = self.execs.get(process.exec_id)
        if known is not None and known.waited_for:
            self._forget(known)
            known = None
        if known is not None or process.exec_id == self.init.exec_id:
            raise RpcError(Code.ALREADY_EXISTS, f"exec {process.exec_id!r} exists already")
        if self.init.ended:
            raise RpcError(Code.FAILED_PRECONDITION, f"container {self.id!r} has ended")
        if len(self.execs) >= _EXEC_LIMIT:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED, f"container {self.id!r} has {_EXEC_LIMIT} processes"
            )
        self.execs[process.exec_id] = process
        path = self._sandbox.new_path("json")
        try:
            _write_json(path, spec.process_spec(oci))
            yield from self._start_process(process, ["exec", "--detach", "--process", path])
        except BaseException:
            del self.execs[process.exec_id]
            raise
        finally:
            _unlink(path)

    def waited(self, process: Process) -> None:
        """Somebody has got its status: an exec is forgotten, once its output was read."""
        if process is self.init or process.waited_for:
            return
        process.waited_for = True
        if process.unread:
            self._sandbox.loop.after(_LINGER, lambda: self._forget(process))
        else:
            self._forget(process)

    def _forget(self, process: Process) -> None:
        if self.execs.get(process.exec_id) is process:
            del self.execs[process.exec_id]
        process.close()

    def _start_process(self, process: Process, arguments: list[str]) -> Generator[Any, Any, None]:
        """Run crun with the process's own stdio, and take the process over."""
        mark = self._sandbox.reaper.mark()
        pid_file = self._sandbox.new_path("pid")
        words = [*arguments, "--pid-file", pid_file]
        terminal = None
        try:
            if process.terminal:
                terminal = TerminalSocket(self._sandbox.loop, self._sandbox.new_path("tty"))
                words += ["--console-socket", terminal.path]
            yield from self._crun(*words, self.id, stdio=process.inside)
            if terminal is not None:
                process.take_terminal((yield terminal.leader))
            with open(pid_file, encoding="ascii") as file:
                pid = int(file.read())
            process.started(pid, self._sandbox.reaper, mark)
        except BaseException:
            process.abandon()
            raise
        finally:
            if terminal is not None:
                terminal.close()
            _unlink(pid_file)

    def remove(self) -> Generator[Any, Any, None]:
        """Kill what runs, and forget the container, its cgroup and its storages."""
        yield from self._crun("delete", "--force", self.id)
        yield from self._sandbox.storages.flush(self.storages)
        self.clean_up()

    def clean_up(self) -> None:
        """What is the agent's own of a container that crun has not, or no more."""
        if self._oom is not None:
            self._oom.close()
            self._oom = None
        for process in (self.init, *self.execs.values()):
            process.close()
        self.execs.clear()
        points, self.storages = self.storages, []
        for point in reversed(points):
            try:
                self._sandbox.storages.detach(point)
            except RpcError as error:
                log.warning("storage stays", error=error)
        self._sandbox.submounts.release(self.submounts)
        self.submounts = []
        _unlink(f"{self.bundle}/config.json")
        try:
            os.rmdir(self.bundle)
        except OSError as error:  # an overlay's upper directory may be in it
            log.debug("bundle stays", container=self.id, error=error)

    # --- while it runs ------------------------------------------------------------------

    def signal(self, exec_id: str, number: int) -> None:
        """Send a signal; "" with SIGKILL means everyone in the container.

        A process that has ended already is no error.
        """
        if not exec_id and number == _SIGKILL:
            self._kill_all()
            return
        process = self.process(exec_id)
        if process.ended or not process.pid:
            return
        if process is self.init and number == _SIGTERM and not _catches(process.pid, number):
            number = _SIGKILL  # the kernel keeps an unhandled signal from a namespace's init
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            pass

    def _kill_all(self) -> None:
        try:
            with open(f"{CGROUPS}{self.cgroup}/cgroup.kill", "w", encoding="ascii") as file:
                file.write("1")
            return
        except OSError:  # cgroup v1, or the cgroup is gone with its processes
            pass
        for _ in range(_KILL_ROUNDS):  # who forks meanwhile is met in the next round
            pids = _pids_v1(self.cgroup)
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, _SIGKILL)
                except ProcessLookupError:
                    pass

    def pause(self) -> Generator[Any, Any, None]:
        yield from self._crun("pause", self.id)

    def resume(self) -> Generator[Any, Any, None]:
        yield from self._crun("resume", self.id)

    def update(self, resources: oci_pb2.LinuxResources) -> Generator[Any, Any, None]:
        """Change the limits."""
        path = self._sandbox.new_path("json")
        try:
            _write_json(path, spec.to_json(resources))
            yield from self._crun("update", "--resources", path, self.id)
        finally:
            _unlink(path)

    def stats(self) -> agent_pb2.StatsContainerResponse:
        """What the guest's kernel counts for it."""
        return cgroup_stats.container_stats(self.cgroup)

    def process(self, exec_id: str) -> Process:
        """The init process for "" or the id it was created with, else an exec.

        Raises:
            RpcError: NOT_FOUND.
        """
        if not exec_id or exec_id == self.init.exec_id:
            return self.init
        process = self.execs.get(exec_id)
        if process is None:
            raise RpcError(
                Code.NOT_FOUND, f"process {exec_id!r} of container {self.id!r} does not exist"
            )
        return process

    def _oom_happened(self) -> None:
        self._sandbox.oom_happened(self.id)

    # --- crun ---------------------------------------------------------------------------

    def _crun(
        self, command: str, *words: str, stdio: tuple[int, int, int] = (-1, -1, -1)
    ) -> Generator[Any, Any, None]:
        """Run crun to its end.

        Raises:
            RpcError: INTERNAL with the last error of its log.
        """
        log_path = self._sandbox.new_path("log")
        argv = [CRUN, "--root", CRUN_STATE, "--cgroup-manager=cgroupfs", "--log", log_path]
        stdin, stdout, stderr = stdio
        try:
            pid = spawn([*argv, command, *words], stdin=stdin, stdout=stdout, stderr=stderr)
            status = yield self._sandbox.reaper.status_of(pid)
            if status:
                text = _last_error(log_path) or f"crun {command} ended with status {status}"
                raise RpcError(Code.INTERNAL, text)
        finally:
            _unlink(log_path)


def _last_error(path: str) -> str:
    """The last line of crun's log, which it writes without any prefix."""
    try:
        with open(path, "rb") as file:
            text = file.read()[-_LOG_TAIL:].decode(errors="replace")
    except FileNotFoundError:
        return ""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _write_json(path: str, document: dict[str, Any]) -> None:
    """Write a document by json's C encoder: the package json imports re, which takes 10 ms."""
    from _json import encode_basestring_ascii, make_encoder

    encode = make_encoder(
        None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, True
    )
    with open(path, "w", encoding="ascii") as file:
        file.write("".join(encode(document, 0)))


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} in a JSON document")


def _pids_v1(cgroup: str) -> list[int]:
    """The processes of a cgroup of version 1; frozen ones are thawed, else they couldn't die."""
    try:
        with open(f"{CGROUPS}/freezer{cgroup}/freezer.state", "w", encoding="ascii") as file:
            file.write("THAWED")
    except OSError:
        pass
    for controller in ("pids", "memory", "devices"):
        try:
            with open(f"{CGROUPS}/{controller}{cgroup}/cgroup.procs", encoding="ascii") as file:
                return [int(line) for line in file]
        except OSError:
            continue
    return []


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (SigCgt of proc(5))."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except OSError:
        pass
    return False


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
