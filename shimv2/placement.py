# SPDX-License-Identifier: Apache-2.0
"""Where on the host a sandbox lives: its network namespace and its cgroups."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from shimv2.cgroups import SandboxCgroups
from shimv2.namespaces import is_host_network, new_network_namespace, open_network_namespace
from ttrpc.errors import Code, RpcError
from vmm.hypervisor import Placement

if TYPE_CHECKING:
    from shimv2.life import Origin

log = logging.getLogger("sandbox")


class SandboxPlacement:
    """Holds the namespace and the cgroups open; leaving the ``with`` block lets go of both.

    Attributes:
        vmm: what the VMM is started with.
        netns_fd: of the pod's network namespace, open as long as the ``with`` block lasts.
        netns_path: where hooks find the pod's network namespace.
        cgroup_dirs: made here, innermost first.
    """

    def __init__(self, sandbox_id: str, origin: Origin) -> None:
        self._id = sandbox_id
        self._origin = origin
        self.netns_fd = -1
        self._cgroups: SandboxCgroups | None = None
        self.vmm = Placement()
        self.netns_path = ""
        self.cgroup_dirs: list[str] = []
        self._confined = "", ""

    def __enter__(self) -> Self:
        wanted = self._origin.netns
        if not wanted:
            log.warning(
                "no network namespace is given: the sandbox gets one of its own, with loopback"
                " only until somebody puts more there"
            )
            self.netns_fd = new_network_namespace()
        elif is_host_network(wanted) and not self._origin.config.runtime.disable_new_netns:
            raise RpcError(
                Code.INVALID_ARGUMENT,
                f"network namespace {wanted!r} is the host's own; a sandbox can't share it"
                " (disable_new_netns lets its VMM be there, and gives it no interface)",
            )
        else:
            self.netns_fd = open_network_namespace(wanted)
        self.netns_path = wanted or f"/proc/{os.getpid()}/fd/{self.netns_fd}"
        try:
            self._cgroups = SandboxCgroups(
                self._id,
                self._origin.cgroups_path,
                sandbox_only=self._origin.config.runtime.sandbox_cgroup_only,
            )
            self._cgroups.create()
            self._cgroups.add_shim()
        except BaseException:
            os.close(self.netns_fd)
            if self._cgroups is not None:
                self._cgroups.delete()
            raise
        self.cgroup_dirs = [str(path) for path in self._cgroups.directories]
        self.vmm = Placement(
            netns=Path(f"/proc/self/fd/{self.netns_fd}"), cgroup_procs=self._cgroups.procs_files()
        )
        return self

    async def add_vcpu_threads(self, threads: Iterable[int]) -> None:
        """Put the VMM's vCPU threads where the pod's CPU limits hold."""
        assert self._cgroups is not None
        # The kernel lets nobody fork for some milliseconds before it moves another's threads.
        await trio.to_thread.run_sync(self._cgroups.add_vcpu_threads, list(threads))

    async def leave(self) -> None:
        """Take this process out of the cgroups, in a thread: the kernel takes its time for it.

        Leaving the ``with`` block does it too, when nothing else is in them any more.
        """
        assert self._cgroups is not None
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._cgroups.take_shim_home)

    def confine(self, cpus: str, nodes: str) -> None:
        """Let the vCPUs run on these CPUs and memory nodes of the host only; "" means all.

        Raises:
            CgroupError: there are none of that kind.
        """
        assert self._cgroups is not None
        if (cpus, nodes) != self._confined:
            self._cgroups.set_cpuset(cpus, nodes)
            self._confined = cpus, nodes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.netns_fd)
        if self._cgroups is not None:
            for problem in self._cgroups.delete():
                log.warning("left behind: %s", problem)
