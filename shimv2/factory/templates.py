# SPDX-License-Identifier: Apache-2.0
"""What a sandbox asks of the templates: to be cloned from one, or that one be made for the next."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from pathlib import Path

from shimv2.config import Config
from shimv2.host_process import HostProcess
from shimv2.machine import CloneError, Machine
from shimv2.vm_settings import vm_config
from vmm.errors import VmmError
from vmm.hypervisor import Placement
from vmm.qemu.driver import Qemu
from vmm.template import TemplateStore

log = logging.getLogger("factory")

LAYOUT = 1
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

    async def clone(self, machine: Machine) -> bool:
        """Start `machine` from its template; False if there is none.

        Raises:
            CloneError: there is one, but it failed; it is gone now.
        """
        self._key = await template_key(self._config)
        with self._store.find(self._key) as template:
            if template is None:
                return False
            await machine.prepare(clonable=True)
            try:
                await machine.clone(template)
            except VmmError as error:
                raise self.failed(error) from error
            return True

    def failed(self, error: VmmError) -> CloneError:
        """The clone that was made is of no use: its template must not be used again."""
        self._store.discard(self._key)
        return CloneError(f"template {self._key[:12]} could not be used and is removed: {error}")

    async def make_beside(self, host_mounts: int) -> None:
        """Have a process of its own make the template that was missing.  Never raises."""
        if not self._config.factory.template_autocreate or not self._store.is_wanted(self._key):
            return
        try:
            await start_maker(self._config, host_mounts)
        except OSError as error:
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
    await process.wait()  # its first process ends at once, and leaves the daemon
