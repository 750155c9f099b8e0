# SPDX-License-Identifier: Apache-2.0
"""All figures of one sandbox: its processes on the host, its calls, and what its guest tells."""

from __future__ import annotations

import contextlib
import resource
import time
from typing import TYPE_CHECKING

import trio

from agent.api import agent_pb2
from shimv2.boot.history import BootRecord
from shimv2.boot.phases import phases
from shimv2.metrics import procfs
from shimv2.metrics.exposition import Page, parse
from shimv2.metrics.overhead import add_overhead, snapshot
from shimv2.metrics.procfs import Process
from shimv2.timeline import process_start
from ttrpc.errors import RpcError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shimv2.guest import Guest
    from shimv2.sandbox import Sandbox
    from shimv2.timeline import Timeline

#: What `kata-monitor` tells sandboxes apart by; a guest can't.
RESERVED = frozenset(("sandbox_id", "cri_uid", "cri_name", "cri_namespace"))

_GUEST_LIMIT = 3.0  # seconds for all that a guest is asked
_GUEST_SAMPLES = 10_000
_ROLES = (("shim", "shim"), ("vmm", "hypervisor"), ("virtiofsd", "virtiofsd"))  # as Kata names them


async def page_of(sandbox: Sandbox) -> Page:
    """Every family there is; those of a guest that does not answer in time are left out."""
    page = Page()
    processes = sandbox.processes
    found = await trio.to_thread.run_sync(_processes, page, processes)
    page.histogram(
        "kata_shim_rpc_durations_histogram_milliseconds",
        "Calls of the container engine to the shim.",
        sandbox.calls,
    )
    _boot(page, sandbox.timeline)
    if sandbox.is_running:
        with contextlib.suppress(RpcError):
            await _add_guest(page, sandbox, await sandbox.guest(), found)
    return page


async def _add_guest(
    page: Page, sandbox: Sandbox, guest: Guest, processes: Mapping[str, Process]
) -> None:
    page.histogram(
        "kata_shim_agent_rpc_durations_histogram_milliseconds",
        "Calls of the shim to the agent.",
        guest.durations,
    )
    if guest.vsock_bytes is not None:
        directions = zip(("to_guest", "from_guest"), guest.vsock_bytes, strict=True)
        page.add(
            "kata_shim_vsock_bytes_total",
            "Payload that went through the sandbox's vsock device.",
            [({"direction": name}, count) for name, count in directions],
            "counter",
        )
    with trio.move_on_after(_GUEST_LIMIT):
        cpu = sum(process.cpu_seconds for process in processes.values())
        now = await snapshot(guest, list(sandbox.containers), cpu)
        memory = sum(process.pss for process in processes.values())
        add_overhead(page, guest, now, memory)
        reply = await guest.call("GetMetrics", agent_pb2.GetMetricsRequest())
        page.merge(guest_page(reply.metrics), {})


def guest_page(text: str) -> Page:
    """The agent's figures; whatever a guest sends, nothing here is of another name than its own."""
    return parse(
        text,
        samples=_GUEST_SAMPLES,
        rename=_guest_name,
        kind_of=_guest_kind,
        reserved=RESERVED,
    )


def _guest_name(name: str) -> str | None:
    if name.startswith("process_"):
        return f"kata_agent_{name}"
    return name if name.startswith(("kata_agent_", "kata_guest_")) else None


def _guest_kind(name: str) -> str:
    # By its name, not by its word: one guest's must not clash with another's on the same page.
    return "counter" if name.endswith(("_total", "_scrape_count")) else "gauge"


def _processes(page: Page, pids: Mapping[str, int]) -> dict[str, Process]:
    """The families of the host's processes; reads /proc for some milliseconds, so in a thread."""
    found: dict[str, Process] = {}
    for role, name in _ROLES:
        if role not in pids:
            continue
        own = found[role] = procfs.read(
            procfs.with_descendants(pids[role]) if role == "virtiofsd" else [pids[role]]
        )
        if not own.threads:
            continue
        page.value(f"kata_{name}_threads", "Threads of the process.", own.threads)
        page.value(f"kata_{name}_fds", "Open descriptors of the process.", own.fds)
        page.items(f"kata_{name}_proc_status", "Its /proc status, sizes in bytes.", own.status)
        page.items(f"kata_{name}_proc_stat", "CPU time in clock ticks.", own.times)
        page.items(f"kata_{name}_io_stat", "Its /proc io.", own.io)
    if "vmm" in pids:
        page.add(
            "kata_hypervisor_netdev",
            "Links in the network namespace of the VMM.",
            [
                ({"interface": link, "item": item}, value)
                for link, items in procfs.interfaces(pids["vmm"])
                for item, value in items.items()
            ],
        )
    add_process_families(page, found.get("shim", Process()))
    return found


def add_process_families(page: Page, own: Process, prefix: str = "") -> None:
    """What Prometheus' clients tell of the process that they are in, here of the caller's."""
    started = time.time() - (time.monotonic() - process_start())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for name, help_, value, kind in (
        ("cpu_seconds_total", "CPU time in seconds.", own.cpu_seconds, "counter"),
        ("max_fds", "Limit of open descriptors.", limit, "gauge"),
        ("open_fds", "Open descriptors.", own.fds, "gauge"),
        ("resident_memory_bytes", "Resident memory.", own.status.get("vmrss", 0), "gauge"),
        ("virtual_memory_bytes", "Virtual memory.", own.status.get("vmsize", 0), "gauge"),
        ("start_time_seconds", "Start, since the epoch.", round(started, 2), "gauge"),
    ):
        page.value(f"{prefix}process_{name}", help_, value, kind)


def _boot(page: Page, timeline: Timeline) -> None:
    """The start of this sandbox; `kata-monitor` has the distribution over all of a host."""
    if "container-started" not in timeline.marks:
        return
    record = BootRecord("sandbox", "default", timeline.kind, timeline.began, timeline.marks)
    page.add(
        "kata_shim_boot_phase_milliseconds",
        "Phases of the sandbox's start, one after the other.",
        [
            ({"kind": record.kind, "phase": phase.name}, round(phase.seconds * 1000, 3))
            for phase in phases(record)
        ],
    )
