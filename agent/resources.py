# SPDX-License-Identifier: Apache-2.0
"""CPUs and memory that the VM was given while it runs, and what the guest can tell of itself."""

from __future__ import annotations

import os

from agent import syscalls as sys_
from agent import uevents
from agent.waiting import Wait
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agent.api import agent_pb2
    from agent.waiting import Work

CPU_TIMEOUT = 5.0  # how long a plugged CPU may take to show up in sysfs


def online_cpu_mem(
    request: agent_pb2.OnlineCPUMemRequest,
    cgroups: Iterable[str] = (),
    sysfs: str = "/sys",
    cgroup_root: str = "",
) -> Work[None]:
    """OnlineCPUMem: bring up plugged CPUs until `nb_cpus` run, and memory unless cpu_only.

    With `wait` set it waits for CPUs that are not in sysfs yet; without, what is there is brought
    up. Then the cpusets of `cgroups` (the containers', relative to each hierarchy's root) and of
    their parents are widened. Raises DEADLINE_EXCEEDED, INTERNAL.
    """
    if request.nb_cpus:
        if request.wait:
            count = request.nb_cpus

            def ready() -> bool:
                online_cpus(count, sysfs)
                return len(parse_cpu_list(_read(f"{sysfs}/devices/system/cpu/online"))) >= count

            if not ready():
                yield Wait(f"{count} CPUs", ready, CPU_TIMEOUT)
        else:
            online_cpus(request.nb_cpus, sysfs)
    if not request.cpu_only:
        online_memory(sysfs)
    widen_cpusets(cgroups, sysfs, cgroup_root)


def online_cpus(wanted: int, sysfs: str = "/sys") -> int:
    """Bring up offline CPUs, in order, until `wanted` are up; returns how many were started."""
    directory = f"{sysfs}/devices/system/cpu"
    present = parse_cpu_list(_read(f"{directory}/present"))
    online = set(parse_cpu_list(_read(f"{directory}/online")))
    started = 0
    for cpu in present:
        if len(online) >= wanted:
            break
        if cpu not in online and uevents.write_sysfs(f"{directory}/cpu{cpu}/online", "1"):
            online.add(cpu)
            started += 1
    return started


def online_memory(sysfs: str = "/sys") -> int:
    """Bring up every offline memory block; returns how many were."""
    directory = f"{sysfs}/devices/system/memory"
    started = 0
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return 0
    for name in names:
        if not name.startswith("memory") or not name[6:].isdigit():
            continue
        state = f"{directory}/{name}/state"
        if _read(state).strip() == "offline" and uevents.write_sysfs(state, "online"):
            started += 1
    return started


def widen_cpusets(cgroups: Iterable[str], sysfs: str = "/sys", cgroup_root: str = "") -> None:
    """Let containers use the CPUs that have come; parents first, as a child can't exceed them.

    In cgroup v2 a cpuset that was never written follows its parent by itself, so there is
    nothing to do; version 1 copies the parent's once, when the cgroup is made.
    """
    root = cgroup_root or f"{sysfs}/fs/cgroup"
    base = f"{root}/cpuset"
    if os.path.exists(f"{root}/cgroup.controllers") or not os.path.isdir(base):
        return
    cpus = _read(f"{sysfs}/devices/system/cpu/online").strip()
    done: set[str] = set()
    for cgroup in cgroups:
        path = base
        for part in cgroup.strip("/").split("/"):
            path = f"{path}/{part}"
            if path in done:
                continue
            done.add(path)
            try:
                with open(f"{path}/cpuset.cpus", "w", encoding="utf-8") as file:
                    file.write(cpus)
            except OSError as error:
                raise RpcError(Code.INTERNAL, f"cpuset of {path}: {error}") from error


def parse_cpu_list(text: str) -> list[int]:
    """`0-2,5` as numbers."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if first.isdigit():
            found.extend(range(int(first), int(last if dash else first) + 1))
    return found


def mem_hotplug_by_probe(addresses: Sequence[int], sysfs: str = "/sys") -> None:
    """MemHotplugByProbe: tell the kernel where memory was plugged. Raises NOT_FOUND, INTERNAL."""
    probe = f"{sysfs}/devices/system/memory/probe"
    for address in addresses:
        try:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise RpcError(Code.NOT_FOUND, f"{probe}: this guest kernel has no probe") from None
        try:
            os.write(descriptor, b"0x%x" % address)
        except OSError as error:
            raise RpcError(Code.INTERNAL, f"{probe}: address {address:#x}: {error}") from error
        finally:
            os.close(descriptor)


def memory_block_size(sysfs: str = "/sys") -> int:
    """Bytes of one memory block; 0 if this guest can't have memory added."""
    text = _read(f"{sysfs}/devices/system/memory/block_size_bytes").strip()
    return int(text, 16) if text else 0


def supports_memory_probe(sysfs: str = "/sys") -> bool:
    return os.path.exists(f"{sysfs}/devices/system/memory/probe")


def add_swap(pci_path: Sequence[int], timeout: float = 3.0) -> Work[None]:
    """AddSwap: use the disk at a PCI path (one slot number an element) as swap space.

    Raises INVALID_ARGUMENT, DEADLINE_EXCEEDED, INTERNAL.
    """
    if not pci_path:
        raise RpcError(Code.INVALID_ARGUMENT, "PCIPath is empty")
    text = "/".join(f"{slot:02x}" for slot in pci_path)
    node = yield from uevents.wait_block_device("blk", text, timeout)
    add_swap_path(node)


def add_swap_path(path: str) -> None:
    """AddSwapPath: use a device node as swap space. Raises NOT_FOUND, INTERNAL."""
    if not os.path.exists(path):
        raise RpcError(Code.NOT_FOUND, f"swap path {path!r} does not exist")
    try:
        sys_.swapon(path)
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"swap on {path}: {error}") from error


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(65536)
    except OSError:
        return ""
