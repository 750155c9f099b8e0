# SPDX-License-Identifier: Apache-2.0
"""What a sandbox asks of the templates: to be cloned from one, or that one be made for the next."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
from pathlib import Path

import trio

from shimv2.config import Config
from shimv2.host_process import HostProcess
from shimv2.machine import CloneError, Machine
from shimv2.vm_settings import vm_config
from vmm.errors import VmmError
from vmm.hypervisor import Placement
from vmm.qemu.driver import Qemu
from vmm.template import TemplateStore

log = logging.getLogger("factory")

_CACHE_LIMIT = 2.0
"""Seconds to wait for the VM cache, which answers in some milliseconds."""

LAYOUT = 2
"""Changed when a template holds another guest state than before: devices, what was settled."""

_MAKER = """\
import sys

sys.path.append({lib!r})
from shimv2.factory.maker import main

main()
"""


def possible(config: Config) -> bool:
    """Whether this configuration can have a template at all."""
    # The agent opens its serial port once, when it starts: a clone's would be another one.
    return config.hypervisor.vsock != "serial" and not config.hypervisor.enable_hugepages


async def template_key(config: Config) -> str:
    """What a template must be saved under to fit this configuration.

    Raises:
        VmmError: the configuration names something that can't work.
    """
    # The id stands in no template; the directory is not used by who starts nothing.
    settings = vm_config(config, "key", Placement(), clonable=True)
    vm = Qemu(settings)
    await vm.check()
    return vm.fingerprint(extra=f"layout {LAYOUT}")


class Templates:
    """The templates of one configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._store = TemplateStore(Path(config.factory.template_path))
        self._key = ""
        self._cloned = False
        self._use_cache = config.factory.vm_cache_number > 0
        self._from_cache = False

    @property
    def may_clone(self) -> bool:
        """Whether sandboxes of this configuration are cloned, not only taken from the cache."""
        return self._config.factory.enable_template

    async def take(self, machine: Machine, sandbox_id: str) -> bool:
        """Let `machine` be a VM that the cache has ready; False if there is none.

        Raises:
            CloneError: there was one, but it failed.
        """
        self._key = await template_key(self._config)
        if not self._use_cache:
            return False
        from vmm.template import handover

        try:
            with trio.fail_after(_CACHE_LIMIT):
                found = await handover.take(
                    self._config.factory.vm_cache_endpoint, self._key, sandbox_id
                )
        except (handover.HandoverError, trio.TooSlowError) as error:
            log.info("no VM from the cache: %s", str(error) or "it does not answer")
            return False
        self._from_cache = True
        try:
            await machine.adopt(found)
        except VmmError as error:
            raise self.failed(error) from error
        return True

    async def clone(self, machine: Machine) -> bool:
        """Start `machine` from its template; False if there is none.

        Raises:
            CloneError: there is one, but it failed; it is gone now.
        """
        self._cloned = True
        self._key = self._key or await template_key(self._config)
        with self._store.find(self._key) as template:
            if template is None:
                return False
            await machine.prepare(clonable=True)
            try:
                await machine.clone(template)
            except VmmError as error:
                raise self.failed(error) from error
            return True

    def what_is_left(self) -> Templates | None:
        """After a `CloneError`: where to look next; None to boot."""
        return self if self.may_clone and not self._cloned else None

    def failed(self, error: VmmError) -> CloneError:
        """The VM that was found is of no use, nor is the template that it came from."""
        if self._from_cache:
            self._from_cache = self._use_cache = False
            return CloneError(f"the VM from the cache could not be used: {error}")
        with contextlib.suppress(OSError):
            self._store.discard(self._key)
        return CloneError(f"template {self._key[:12]} could not be used and is removed: {error}")

    async def make_beside(self, host_mounts: int) -> None:
        """Have a process of its own make the template that was missing.  Never raises."""
        factory = self._config.factory
        if not (factory.enable_template and factory.template_autocreate):
            return
        try:
            if not self._store.is_wanted(self._key):
                return
            await start_maker(self._config, host_mounts)
        except Exception as error:  # the sandbox that runs beside needs none
            log.warning("no template is made: %s", error)
        else:
            log.info("template %s is being made for the next sandboxes", self._key[:12])


async def start_maker(config: Config, host_mounts: int) -> None:
    """Start `shimv2.factory.maker` as a daemon; it belongs to no sandbox.

    Args:
        host_mounts: the host's mount namespace, where it is to live.

    Raises:
        OSError: it can't be started.
    """
    fd = os.memfd_create("template-config")
    try:
        os.write(fd, pickle.dumps(config))
        os.lseek(fd, 0, os.SEEK_SET)
        library = str(Path(__file__).parents[2])
        process = HostProcess.start(
            sys.executable,
            [sys.executable, "-IS", "-c", _MAKER.format(lib=library)],
            {"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")},
            descriptors={0: fd},
            mount_namespace=host_mounts,
        )
    finally:
        os.close(fd)
    try:
        await process.wait()  # its first process ends at once, and leaves the daemon
    finally:
        process.close()
