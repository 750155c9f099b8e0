# SPDX-License-Identifier: Apache-2.0
"""How guest-kernel work that may have to wait tells so, without owning a loop.

A function that may wait is a generator: it yields a `Wait` (resume me when `ready()` is true) or
a `Command` (run this program and send me its `CommandResult`), and returns its value. The agent's
loop parks such a generator; `run` below drives one to its end by blocking, for start-up and tests.

    work = storages.attach(requests)
    step = next(work)                       # StopIteration.value: done at once, the usual case
    ... uevents readable, or step.deadline passed: if step.ready(): work.send(None)
                                            elif now >= step.deadline: work.throw(step.expired())
    ... a Command's process was reaped:     work.send(CommandResult(status, stdout, stderr))
"""

from __future__ import annotations

import time

from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False  # importing typing costs milliseconds in the guest
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import TypeAlias, TypeVar

    T = TypeVar("T")

    Work: TypeAlias = Generator["Wait | Command", "CommandResult | None", T]


class Wait:
    """A condition of the guest kernel, cheap to check, with a deadline on `time.monotonic()`.

    Kernel events (`Uevents`) only hint at when to check again: what counts is `ready()`.
    `interval` is how long in seconds the loop may sleep before it checks without any event.
    """

    __slots__ = ("deadline", "interval", "ready", "what")

    def __init__(
        self, what: str, ready: Callable[[], bool], timeout: float, interval: float = 0.1
    ) -> None:
        self.what = what
        self.ready = ready
        self.deadline = time.monotonic() + timeout
        self.interval = interval

    def expired(self) -> RpcError:
        """The error to throw into the generator once the deadline has passed."""
        return RpcError(Code.DEADLINE_EXCEEDED, f"timed out waiting for {self.what}")


def breathe() -> Wait:
    """A Wait that is ready at once: gives the loop its turn in the middle of long work."""
    return Wait("the loop", lambda: True, 3600.0, 0.0)


class Command:
    """A program to run, with the bytes for its standard input. `argv[0]` is an absolute path."""

    __slots__ = ("argv", "stdin")

    def __init__(self, argv: list[str], stdin: bytes = b"") -> None:
        self.argv = argv
        self.stdin = stdin


class CommandResult:
    """How a Command ended: exit code (128 + n for signal n) and what it wrote."""

    __slots__ = ("status", "stderr", "stdout")

    def __init__(self, status: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


def run(work: Work[T]) -> T:
    """Drive `work` to its end, blocking. Raises what the work raises."""
    try:
        step = next(work)
        while True:
            if isinstance(step, Command):
                step = work.send(_run_command(step))
            elif step.ready():
                step = work.send(None)
            elif time.monotonic() >= step.deadline:
                step = work.throw(step.expired())
            else:
                time.sleep(min(step.interval, 0.01))
    except StopIteration as end:
        value: T = end.value
        return value


def _run_command(command: Command) -> CommandResult:
    import subprocess

    done = subprocess.run(command.argv, input=command.stdin, capture_output=True, check=False)
    status = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return CommandResult(status, done.stdout, done.stderr)
