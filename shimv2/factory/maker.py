# SPDX-License-Identifier: Apache-2.0
"""The process that makes one template: boots a VM, settles it, saves it, ends.

It is nobody's child and in no sandbox's cgroup, so that it outlives the sandbox that was the
first to miss the template; it has the least weight that the host's scheduler knows, a lock that
names it, and a deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from shimv2.config import Config
from shimv2.factory import home
from shimv2.factory.settle import settle
from shimv2.factory.templates import possible, template_key
from shimv2.guest import Guest
from shimv2.timeline import Timeline
from vmm.errors import UnsupportedError, VmmError, ungrouped
from vmm.template import TemplateBusyError, TemplateStore

log = logging.getLogger("factory")

DEADLINE = 300.0
"""Seconds; an emulated VM on a busy host needs 20 at the most."""
CGROUP = "/kata_factory"


def main() -> None:
    """Entry point of the daemon: the configuration comes pickled on stdin."""
    config: Config = pickle.load(sys.stdin.buffer)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    with contextlib.suppress(TemplateBusyError, Exception):
        trio.run(make_quietly, config)


async def make_quietly(config: Config) -> None:
    """As `make`, out of everybody's way: for a process that does nothing else."""
    os.nice(19)
    await make(config, lambda _text: None)


async def exists(config: Config) -> bool:
    """Whether the template of `config` is there, whole.

    Raises:
        VmmError: the configuration names something that can't work.
    """
    key = await template_key(config)
    with TemplateStore(Path(config.factory.template_path)).find(key) as template:
        return template is not None


async def make(config: Config, say: Callable[[str], None]) -> str:
    """Make the template of `config`; returns its key.

    Args:
        say: told each step as it begins.

    Raises:
        TemplateBusyError: another process is making it.
        VmmError: it can't be made; the reason is kept with the templates as well.
    """
    if not possible(config):
        raise UnsupportedError("this configuration (serial vsock or hugepages) has no templates")
    began = time.monotonic()
    store = TemplateStore(Path(config.factory.template_path))
    key = await template_key(config)
    name = _name(store, key)
    store.tidy(keep=key)
    remove_leftovers(store)
    with store.make(key) as making, home.home(CGROUP, name, move_in=True) as placement, ungrouped():
        async with (
            _deadline() as scope,
            Guest(
                config,
                name,
                placement=placement,
                timeline=Timeline(),
                on_process=home.forget_process,
            ) as guest,
        ):
            say("booting a VM")
            await guest.boot_template()
            say("running a container in it once, so that clones find all of it in memory")
            await settle(guest)
            say("saving it")
            await guest.save(making.directory)
        if scope.cancelled_caught:
            raise VmmError(f"the template was not ready within {DEADLINE:g} s, or was stopped")
        hypervisor = config.hypervisor
        roots = (hypervisor.image, hypervisor.initrd)
        making.publish(
            {
                "seconds": round(time.monotonic() - began, 3),
                "kernel": str(hypervisor.kernel),
                "image": str(hypervisor.image or hypervisor.initrd),
                "vcpus": hypervisor.default_vcpus,
                "memory_mib": hypervisor.default_memory,
            },
            [path for path in (hypervisor.path, hypervisor.kernel, *roots) if path is not None],
        )
    return key


def remove_leftovers(store: TemplateStore) -> None:
    """Remove what makers of this store that were killed have left."""
    busy = {_name(store, e.key) for e in store.status() if e.state == "being made"}
    home.remove_leftovers(CGROUP, home.prefix_of("template", store.root), busy)


def _name(store: TemplateStore, key: str) -> str:
    return f"{home.prefix_of('template', store.root)}{key[:16]}"


@contextlib.asynccontextmanager
async def _deadline() -> AsyncIterator[trio.CancelScope]:
    """A scope that ends by time, and by SIGTERM."""

    async def watch(scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                scope.cancel()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope(deadline=trio.current_time() + DEADLINE) as scope:
            nursery.start_soon(watch, scope)
            yield scope
        nursery.cancel_scope.cancel()
