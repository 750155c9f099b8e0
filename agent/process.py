# SPDX-License-Identifier: Apache-2.0
"""A process of a container: its stdio, its pid, its end."""

from __future__ import annotations

import fcntl
import os

from agent import log
from agent.loop import READ, Future, Loop
from agent.reaper import Reaper
from agent.stdio import Output, RawInput, RawOutput, RpcInput, RpcOutput, Streams
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

_DRAIN_LIMIT = 5.0  # seconds the status waits for output that the host doesn't take
_F_SETPIPE_SZ = 1031
_RAW_PIPE_SIZE = 256 << 10  # measured: 1.7 times as fast as the kernel's 64 KiB, 1 MiB is slower
_TIOCSWINSZ = 0x5414


class Ports:
    """The host ports of a process's raw streams; 0 where there is none."""

    __slots__ = ("stderr", "stdin", "stdout")

    def __init__(self, stdin: int, stdout: int, stderr: int) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr


class Process:
    """One process.

    Attributes:
        pid: in the agent's pid namespace, 0 before the start.
        exited: the future of its status, once all it wrote is on its way to the host.
    """

    def __init__(self, loop: Loop, exec_id: str, *, terminal: bool, user: tuple[int, int]) -> None:
        self.exec_id = exec_id
        self.terminal = terminal
        self.pid = 0
        self.exited = Future()
        self.ended = False  # the process is gone, its output may be still on its way
        self.waited_for = False  # somebody has its status
        self._loop = loop
        self._user = user
        self._inside: list[int] = [-1, -1, -1]  # the process's ends, until it has them
        self._outside: list[int] = [-1, -1, -1]
        self._leader = -1  # of a terminal
        self._ports = Ports(0, 0, 0)
        self.stdin: RawInput | RpcInput | None = None
        self.stdout: RawOutput | RpcOutput | None = None
        self.stderr: RawOutput | RpcOutput | None = None
        self._raw: dict[str, int] = {}

    # --- before the start ---------------------------------------------------------------

    def prepare(
        self, streams: Streams, ports: Ports, pipe_size: int
    ) -> Generator[Future, Any, None]:
        """Claim the raw streams, and make the pipes.  On an error nothing stays open."""
        self._ports = ports
        try:
            for name in ("stdin", "stdout", "stderr"):
                port = getattr(ports, name)
                if port:
                    self._raw[name] = yield streams.claim(port)
            if not self.terminal:
                self._make_pipes(pipe_size)
        except BaseException:
            self.abandon()
            raise

    def _make_pipes(self, size: int) -> None:
        for number in range(3):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            inside, outside = (read_end, write_end) if number == 0 else (write_end, read_end)
            self._inside[number], self._outside[number] = inside, outside
            os.fchown(inside, *self._user)  # so that its user can open /dev/stdout again
            wanted = size or (_RAW_PIPE_SIZE if number and self._raw else 0)
            if wanted:
                fcntl.fcntl(inside, _F_SETPIPE_SZ, wanted)

    @property
    def inside(self) -> tuple[int, int, int]:
        """The descriptors to start the process with; -1 each for a terminal."""
        return self._inside[0], self._inside[1], self._inside[2]

    def take_terminal(self, leader: int) -> None:
        """The pty that crun has made for the process."""
        self._leader = leader

    def abandon(self) -> None:
        """It will not run: close everything."""
        for fd in (*self._inside, *self._outside, self._leader, *self._raw.values()):
            if fd >= 0:
                os.close(fd)
        self._inside, self._outside = [-1, -1, -1], [-1, -1, -1]
        self._leader = -1
        self._raw.clear()

    # --- running ------------------------------------------------------------------------

    def started(self, pid: int, reaper: Reaper, since: int) -> None:
        """It runs: begin to carry its stdio and to wait for its end.

        Args:
            since: the reaper's mark before it was started.
        """
        self.pid = pid
        for fd in self._inside:
            if fd >= 0:
                os.close(fd)
        self._inside = [-1, -1, -1]
        if self.terminal:
            self._carry_terminal()
        else:
            self._carry_pipes()
        reaper.status_of(pid, since).then(self._reaped)

    def _carry_pipes(self) -> None:
        stdin, stdout, stderr = self._outside
        self._outside = [-1, -1, -1]
        self.stdin = self._input(stdin)
        self.stdout = self._output("stdout", stdout, is_pipe=True)
        self.stderr = self._output("stderr", stderr, is_pipe=True)

    def _carry_terminal(self) -> None:
        leader, self._leader = self._leader, -1
        if leader < 0:
            raise RpcError(Code.INTERNAL, "crun gave no terminal")
        # Each direction has a descriptor of its own, to be watched and closed by itself.
        self.stdin = self._input(fcntl.fcntl(leader, fcntl.F_DUPFD_CLOEXEC, 0))
        self.stdout = self._output("stdout", leader, is_pipe=False)
        unused = self._raw.pop("stderr", -1)
        if unused >= 0:
            os.close(unused)

    def _input(self, target: int) -> RawInput | RpcInput:
        source = self._raw.pop("stdin", -1)
        if source >= 0:
            return RawInput(self._loop, source, target, is_terminal=self.terminal)
        return RpcInput(self._loop, target, is_terminal=self.terminal)

    def _output(self, name: str, source: int, *, is_pipe: bool) -> RawOutput | RpcOutput:
        sink = self._raw.pop(name, -1)
        if sink >= 0:
            return RawOutput(self._loop, source, sink, is_pipe=is_pipe)
        return RpcOutput(self._loop, source)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the terminal.

        Raises:
            RpcError: UNAVAILABLE, it has none.
        """
        if self.stdout is None or not self.terminal or self.stdout.source < 0:
            raise RpcError(Code.UNAVAILABLE, f"process {self.exec_id!r} has no terminal")
        size = b"".join(n.to_bytes(2, "little") for n in (rows & 0xFFFF, columns & 0xFFFF, 0, 0))
        fcntl.ioctl(self.stdout.source, _TIOCSWINSZ, size)

    def _reaped(self, status: Future) -> None:
        self.ended = True
        if self.stdin is not None:
            self.stdin.close()
        waiting = [out.process_ended() for out in self._outputs()]

        def check(_: Future | None = None) -> None:
            if all(future.done for future in waiting):
                self.exited.set(status.value)

        for future in waiting:
            future.then(check)
        check()
        if not self.exited.done:
            self._loop.after(_DRAIN_LIMIT, lambda: self._not_taken(status.value))

    def _not_taken(self, status: int) -> None:
        if not self.exited.done:
            log.warning("output was not taken", process=self.exec_id, seconds=_DRAIN_LIMIT)
            self.exited.set(status)

    def _outputs(self) -> list[Output]:
        return [out for out in (self.stdout, self.stderr) if out is not None]

    @property
    def unread(self) -> bool:
        """Whether there may be output that calls have yet to read."""
        return any(isinstance(out, RpcOutput) and out.source >= 0 for out in self._outputs())

    def close(self) -> None:
        """Nobody asks for it any more.  Raw output goes on until its end: it may be on its way."""
        if self.stdin is not None:
            self.stdin.close()
        for out in self._outputs():
            if isinstance(out, RpcOutput):
                out.close()


class TerminalSocket:
    """The socket on which crun hands over the pty it has made (its --console-socket)."""

    def __init__(self, loop: Loop, path: str) -> None:
        import _socket

        self.path = path
        self.leader = Future()
        self._loop = loop
        kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._listener = _socket.socket(_socket.AF_UNIX, kind)
        self._listener.bind(path)
        self._listener.listen(1)
        loop.watch(self._listener.fileno(), READ, self._accept)

    def close(self) -> None:
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        if not self.leader.done:
            self.leader.fail(RpcError(Code.INTERNAL, "crun gave no terminal"))

    def _accept(self, _events: int) -> None:
        import _socket

        fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        connection = _socket.socket(fileno=fd)
        try:
            # crun sends at once what it has connected for.
            connection.setblocking(True)
            _, ancillary, _, _ = connection.recvmsg(256, _socket.CMSG_SPACE(4))
            for level, kind, data in ancillary:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    leader = int.from_bytes(data[:4], "little")
                    os.set_inheritable(leader, False)
                    self.leader.set(leader)
        finally:
            connection.close()
