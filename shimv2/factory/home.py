# SPDX-License-Identifier: Apache-2.0
"""Where VMs live that belong to no sandbox yet: those of makers and of the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from shimv2.cgroups import SandboxCgroups, hierarchies, remove
from shimv2.namespaces import new_network_namespace
from shimv2.state import VMS, remove_tree, vm_dir
from vmm.hypervisor import Placement


def prefix_of(kind: str, path: str | os.PathLike[str]) -> str:
    """Of the ids of all VMs of one owner: another one, at another path, has other ids."""
    return f"{kind}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}-"


@contextlib.contextmanager
def home(parent: str, name: str, *, move_in: bool = False) -> Iterator[Placement]:
    """A network namespace, cgroups of the least weight and a state directory for one VM; nothing
    is left of them.

    Args:
        parent: path of the cgroup above it.
        name: the VM's id.
        move_in: this process goes into the cgroups as well.
    """
    cgroups = SandboxCgroups(name, f"{parent}/{name}", sandbox_only=True)
    netns = new_network_namespace()
    try:
        cgroups.create()
        if move_in:
            cgroups.add_shim(stay=True)
        cgroups.set_least_weight()
        yield Placement(netns=Path(f"/proc/self/fd/{netns}"), cgroup_procs=cgroups.procs_files())
    finally:
        os.close(netns)
        cgroups.delete()
        remove_tree(vm_dir(name))


def remove_leftovers(parent: str, prefix: str, busy: Collection[str] = ()) -> None:
    """Remove what owners that were killed have left of VMs whose ids begin with `prefix`:
    directories, and cgroups below `parent`.

    Args:
        busy: ids of VMs that are in use.
    """
    left = [path for path in Path(VMS).glob(f"{prefix}*") if path.name not in busy]
    for directory in left:
        remove_tree(directory)
    for hierarchy in hierarchies():
        for cgroup in (hierarchy.root / parent[1:]).glob(f"kata_{prefix}*"):
            if cgroup.name.removeprefix("kata_") not in busy:
                remove(cgroup)


def forget_process(_name: str, _pid: int) -> None:
    """For `Guest`: helpers die with this process, or by their keepers; nobody looks for them."""
