# SPDX-License-Identifier: Apache-2.0
"""The agent's only loop: descriptors, timers, and work that waits.

One thread.  What waits is a generator (`agent.waiting`) that the loop parks and resumes:
it may yield a `Future`, a `Wait` or a `Command`.
"""

from __future__ import annotations

import select
import time
from heapq import heapify, heappop, heappush

from agent.waiting import Command, Wait

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
PRIORITY = select.EPOLLPRI

_EVENTS_AT_ONCE = 64
_TIMERS_KEPT = 256  # below this many, cancelled ones may wait for their time


class Future:
    """A value that comes later; many may wait for it."""

    __slots__ = ("_callbacks", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._callbacks: list[Callable[[Future], None]] = []

    def set(self, value: Any = None) -> None:
        """Give the value; a second one is ignored."""
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """Give an error in place of the value."""
        self._finish(None, error)

    def then(self, callback: Callable[[Future], None]) -> None:
        """Call back once it is done: at once if it is."""
        if self.done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        if self.done:
            return
        self.done, self.value, self.error = True, value, error
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)


class Timer:
    """A callback at a time of `time.monotonic()`; `cancel` makes it a no-op."""

    __slots__ = ("at", "callback")

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.at < other.at


class Loop:
    """See the module's docstring.

    Args:
        on_error: told of an exception that a callback let out; the loop goes on.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._poll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._prune_at = _TIMERS_KEPT
        self._parked: list[Task] = []
        self._on_error = on_error
        self._running = True
        self.run_command: Callable[[Command], Future] | None = None

    # --- descriptors and timers ---------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback` with the events whenever `fd` has some; replaces an earlier watch."""
        if fd in self._callbacks:
            self._poll.modify(fd, events)
        else:
            self._poll.register(fd, events)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; must come before it is closed."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, in so many seconds."""
        if len(self._timers) >= self._prune_at:
            self._timers = [timer for timer in self._timers if timer.callback is not None]
            heapify(self._timers)
            self._prune_at = 2 * len(self._timers) + _TIMERS_KEPT
        timer = Timer(time.monotonic() + seconds, callback)
        heappush(self._timers, timer)
        return timer

    # --- work ---------------------------------------------------------------------------

    def spawn(self, work: Generator[Any, Any, Any]) -> Task:
        """Run a generator until it first waits; its task's future is its return value."""
        task = Task(self, work)
        task.step(None, None)
        return task

    def recheck(self) -> None:
        """Something happened in the kernel: look at every condition that is waited for."""
        for task in list(self._parked):
            task.check()

    def park(self, task: Task) -> None:
        self._parked.append(task)

    def unpark(self, task: Task) -> None:
        self._parked.remove(task)

    # --- running ------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`."""
        while self._running:
            self.turn()

    def stop(self) -> None:
        self._running = False

    def turn(self) -> None:
        """Wait for the next events or timer, and serve them."""
        timeout = -1.0
        while self._timers and self._timers[0].callback is None:
            heappop(self._timers)
        if self._timers:
            timeout = max(0.0, self._timers[0].at - time.monotonic())
        for fd, events in self._poll.poll(timeout, _EVENTS_AT_ONCE):
            callback = self._callbacks.get(fd)
            if callback is not None:  # an earlier callback may have unwatched it
                self._guarded(callback, events)
        now = time.monotonic()
        while self._timers and self._timers[0].at <= now:
            timer = heappop(self._timers)
            if timer.callback is not None:
                self._guarded(timer.callback)

    def _guarded(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            self._on_error(error)


class Task:
    """A generator on its way.

    Attributes:
        future: what it returns or raises.
    """

    __slots__ = ("_cancelled", "_loop", "_timer", "_wait", "_work", "future")

    def __init__(self, loop: Loop, work: Generator[Any, Any, Any]) -> None:
        self._loop = loop
        self._work = work
        self._wait: Wait | None = None
        self._timer: Timer | None = None
        self._cancelled = False
        self.future = Future()

    def cancel(self) -> None:
        """Close the generator where it waits; the future stays without a value."""
        if self.future.done or self._cancelled:
            return
        self._cancelled = True
        if self._wait is not None:
            self._unpark()
        self._work.close()

    def step(self, value: Any, error: BaseException | None) -> None:
        """Resume until it waits for something that is not there yet."""
        while True:
            try:
                if error is not None:
                    thrown, error = error, None
                    step = self._work.throw(thrown)
                else:
                    step = self._work.send(value)
            except StopIteration as end:
                self.future.set(end.value)
                return
            except Exception as raised:
                self.future.fail(raised)
                return
            if isinstance(step, Wait):
                if step.ready() and step.interval:
                    value = None
                    continue
                self._park(step)
                return
            if isinstance(step, Command):
                assert self._loop.run_command is not None
                step = self._loop.run_command(step)
            if not step.done:
                step.then(self._resume)
                return
            value, error = step.value, step.error

    def check(self) -> None:
        """Resume if what is waited for is true, or its time is over."""
        wait = self._wait
        if wait is None:
            return
        if wait.ready():
            self._unpark()
            self.step(None, None)
        elif time.monotonic() >= wait.deadline:
            self._unpark()
            self.step(None, wait.expired())
        else:
            self._arm(wait)

    def _resume(self, future: Future) -> None:
        if not self._cancelled:
            self.step(future.value, future.error)

    def _park(self, wait: Wait) -> None:
        self._wait = wait
        self._loop.park(self)
        self._arm(wait)

    def _arm(self, wait: Wait) -> None:
        if self._timer is not None:
            self._timer.cancel()
        left = max(0.0, wait.deadline - time.monotonic())
        self._timer = self._loop.after(min(wait.interval, left), self.check)

    def _unpark(self) -> None:
        self._wait = None
        self._loop.unpark(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
