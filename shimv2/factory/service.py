# SPDX-License-Identifier: Apache-2.0
"""``kata-vm-cache``: keeps VMs ready, and gives each away once; keeps shims ready too.

They are clones of the template that went their hot path once more, so that under an emulator it
is translated, and under KVM its memory is mapped.  They have no vhost-user device and no NIC and
are paused; whoever takes one plugs its own.  A VM that was given away has nothing to do with
this process any more: its keeper lives on by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import itertools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import trio

from shimv2.cgroups import CgroupError
from shimv2.cli import UsageError, check_id
from shimv2.config import Config, ConfigError, load_config
from shimv2.factory import home, maker
from shimv2.factory.settle import settle
from shimv2.factory.templates import Templates, possible, template_key
from shimv2.guest import Guest
from shimv2.ready.keeper import keep_ready_shims
from shimv2.state import vm_dir
from shimv2.timeline import Timeline
from shimv2.volumes import sandbox_storages
from ttrpc.errors import RpcError
from vmm.errors import VmmError, ungrouped
from vmm.hypervisor import Handover
from vmm.template import TemplateBusyError
from vmm.template.handover import HandoverError, receive, send

log = logging.getLogger("factory")

PROGRAM = "kata-vm-cache"
_RETRY_AFTER = 10.0  # seconds after a VM could not be made
_CALM = 1.0  # seconds without a request before the pool is filled again
_REQUEST_LIMIT = 5.0  # seconds for a peer to say what it wants
_ACCEPT_PAUSE = 0.1  # seconds, where there is no descriptor for another peer
_FAILURES = (VmmError, RpcError, CgroupError, OSError)  # of one VM, not of the cache
_CGROUP = "/kata_cache"


class Pooled:
    """One VM that is ready.

    Attributes:
        taken: set by who takes it; then `handover` is made by the VM's own task.
    """

    def __init__(self, name: str, guest: Guest, seconds: float) -> None:
        self.name = name
        self.guest = guest
        self.seconds = seconds
        self.since = time.time()
        self.taken = trio.Event()
        self.released = trio.Event()
        self.handover: Handover | None = None


class Cache:
    """The pool of one configuration.

    Args:
        config: with `vm_cache_number` and the template's settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ready: list[Pooled] = []
        self._changed = trio.Event()
        prefix = prefix_of(config)
        self._names = (f"{prefix}{os.getpid()}-{n}" for n in itertools.count(1))
        self._nursery: trio.Nursery
        self._taken_at = 0.0
        self.key = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the pool full until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                try:
                    await self._fill()
                except _FAILURES as error:
                    log.warning("no VM could be made: %s", error)
                    await trio.sleep(_RETRY_AFTER)
                    continue
                changed = self._changed = trio.Event()
                if len(self._ready) >= self._config.factory.vm_cache_number:
                    await changed.wait()
                await self._calm()

    async def _calm(self) -> None:
        """Let those who took a VM have the processors; an empty pool waits for nobody."""
        while self._ready and (left := self._taken_at + _CALM - trio.current_time()) > 0:
            await trio.sleep(left)

    async def take(self, key: str, sandbox_id: str) -> Handover:
        """Give a VM to a sandbox.

        Raises:
            HandoverError: there is none that fits.
        """
        if key != self.key:
            self._changed.set()  # ours may be the stale one
            raise HandoverError("the cached VMs are of another configuration")
        if not self._ready:
            raise HandoverError("no VM is ready yet")
        pooled = self._ready.pop(0)
        self._taken_at = trio.current_time()
        self._changed.set()
        pooled.taken.set()
        await pooled.released.wait()
        if pooled.handover is None:
            raise HandoverError("the VM was lost in the last moment")
        try:
            vm_dir(pooled.name).rename(vm_dir(sandbox_id))
        except OSError as error:
            for fd in pooled.handover.descriptors:
                os.close(fd)
            raise HandoverError(f"{vm_dir(sandbox_id)}: {error.strerror}") from error
        return pooled.handover

    def status(self) -> list[dict[str, Any]]:
        """A row for each VM that is ready."""
        return [
            {"name": p.name, "pid": p.guest.pid, "since": p.since, "seconds": p.seconds}
            for p in self._ready
        ]

    async def _fill(self) -> None:
        """Make what is missing, one after the other; drop what no sandbox can use any more."""
        key = await template_key(self._config)
        if key != self.key:
            for pooled in self._ready:
                pooled.released.set()
            self._ready.clear()
            self.key = key
            await self._make_template()
        while len(self._ready) < self._config.factory.vm_cache_number:
            await self._nursery.start(self._keep, next(self._names))

    async def _make_template(self) -> None:
        with contextlib.suppress(TemplateBusyError):
            if not await maker.exists(self._config):
                await maker.make(self._config, log.info)

    async def _keep(self, name: str, *, task_status: trio.TaskStatus[None]) -> None:
        """As `_keep_one`; the end of a VM that was ready is not the end of the others."""
        ready = _Ready(task_status)
        try:
            await self._keep_one(name, task_status=ready)
        except _FAILURES as error:
            if not ready.told:
                raise
            log.warning("VM %s: %s", name, error)

    async def _keep_one(self, name: str, *, task_status: trio.TaskStatus[None]) -> None:
        """The life of a pooled VM: clone, settle, wait, and be gone or somebody else's."""
        began = time.monotonic()
        pooled: Pooled | None = None
        with home.home(_CGROUP, name) as placement, ungrouped():
            async with Guest(
                self._config,
                name,
                placement=placement,
                timeline=Timeline(),
                on_process=home.forget_process,
                pooled=True,
            ) as guest:
                await guest.boot_bare(Templates(self._config))
                await guest.rehearse(sandbox_storages(None))
                await settle(guest)
                await guest.put_aside()
                pooled = Pooled(name, guest, round(time.monotonic() - began, 3))
                self._ready.append(pooled)
                task_status.started()
                try:
                    await self._wait_taken(pooled)
                finally:
                    if pooled in self._ready:
                        self._ready.remove(pooled)
                        self._changed.set()
                    pooled.released.set()
        if pooled.handover is not None:
            await _reap(pooled.handover.pids[1])

    async def _wait_taken(self, pooled: Pooled) -> None:
        """Until it is taken, dropped or lost."""
        async with trio.open_nursery() as nursery:

            async def until(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, pooled.taken)
            nursery.start_soon(until, pooled.released)
            await pooled.guest.wait_vm_gone()
            nursery.cancel_scope.cancel()
        if pooled.taken.is_set():
            with contextlib.suppress(VmmError):
                pooled.handover = pooled.guest.release()


class _Ready(trio.TaskStatus[None]):
    """Attributes: told: whoever waited for the start has been told of it."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status
        self.told = False

    def started(self, value: None = None) -> None:
        self.told = True
        self._status.started()


async def _reap(pid: int) -> None:
    """Wait for a keeper, whose VM is somebody else's, so that it is no zombie."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
        os.waitpid(pid, os.WNOHANG)


async def serve(cache: Cache, listener: trio.socket.SocketType) -> None:
    """Answer requests until cancelled."""
    async with trio.open_nursery() as nursery:
        while True:
            try:
                peer, _ = await listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    raise
                log.warning("a request can't be taken: %s", error.strerror)
                await trio.sleep(_ACCEPT_PAUSE)
                continue
            nursery.start_soon(_answer, cache, peer)


async def _answer(cache: Cache, peer: trio.socket.SocketType) -> None:
    with peer:
        descriptors: tuple[int, ...] = ()
        try:
            with trio.fail_after(_REQUEST_LIMIT):
                request, unwanted = await receive(peer)
            for fd in unwanted:
                os.close(fd)
            if request.get("action") == "status":
                await send(peer, {"pid": os.getpid(), "key": cache.key, "machines": cache.status()})
                return
            sandbox_id = str(request.get("id", ""))
            check_id("id", sandbox_id)
            handover = await cache.take(str(request.get("key", "")), sandbox_id)
            descriptors = handover.descriptors
            await send(
                peer, {"facts": dict(handover.facts), "pids": handover.pids}, handover.descriptors
            )
            log.info("a VM was given to sandbox %s", sandbox_id)
        except (VmmError, UsageError, OSError) as error:
            with contextlib.suppress(HandoverError):
                await send(peer, {"error": str(error)})
        except trio.TooSlowError:
            return
        finally:
            # Ours go in any case: with the last copy of the owner's pipe its VM would go too.
            for fd in descriptors:
                os.close(fd)


def prefix_of(config: Config) -> str:
    """Of the ids of one cache's VMs: another one, at another place, has other ids."""
    return home.prefix_of("cache", os.path.abspath(config.factory.vm_cache_endpoint))


@contextlib.asynccontextmanager
async def _listener(path: Path) -> AsyncIterator[trio.socket.SocketType]:
    """The only cache at this path.

    Raises:
        VmmError: there is another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_suffix(".lock")
    with name.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VmmError(f"another VM cache serves {path} already") from None
        if not (name.exists() and os.path.samestat(os.fstat(lock.fileno()), name.stat())):
            # The one before took its lock away between our open and our lock.
            raise VmmError(f"another VM cache was just ending at {path}; start this one again")
        path.unlink(missing_ok=True)
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            await listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(64)
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)
                Path(lock.name).unlink(missing_ok=True)


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        VmmError: it can't be served.
    """
    async with _listener(Path(config.factory.vm_cache_endpoint)) as listener:
        home.remove_leftovers(_CGROUP, prefix_of(config))  # of a cache that was killed
        cache = Cache(config)
        async with trio.open_nursery() as nursery:
            if config.factory.vm_cache_number:
                nursery.start_soon(cache.run)
            if config.factory.ready_shims:
                nursery.start_soon(keep_ready_shims)
            nursery.start_soon(serve, cache, listener)
            _notify_ready()
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()
                    return


def _notify_ready() -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(b"READY=1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Keeps VMs ready for sandboxes of this host: as many as vm_cache_number in "
        "section [factory] of configuration.toml says; and a process from which shims are forked, "
        "with all modules loaded (ready_shims). Ends by SIGTERM; sandboxes that got "
        "their VM here live on.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="instead of the first configuration.toml found"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(options.config.absolute() if options.config else None)
        if not (config.factory.vm_cache_number or config.factory.ready_shims):
            raise VmmError(
                "section [factory] has vm_cache_number = 0 and ready_shims = false: there is "
                "nothing to keep"
            )
        if config.factory.vm_cache_number and not possible(config):
            raise VmmError("this configuration (serial vsock or hugepages) has no templates")
        with ungrouped():
            trio.run(run, config)
    except (VmmError, ConfigError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0
