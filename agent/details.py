# SPDX-License-Identifier: Apache-2.0
"""GetGuestDetails: what this agent and its kernel can do."""

from __future__ import annotations

from agent import devices, resources, storage
from agent.api import agent_pb2
from agent.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def guest_details(request: Any) -> agent_pb2.GuestDetailsResponse:
    """The answer; the two figures about memory only if asked for."""
    reply = agent_pb2.GuestDetailsResponse()
    if request.mem_block_size:
        reply.mem_block_size_bytes = resources.memory_block_size()
    if request.mem_hotplug_probe:
        reply.support_mem_hotplug_probe = resources.supports_memory_probe()
    details = reply.agent_details
    details.version = VERSION
    details.init_daemon = True
    details.device_handlers.extend(devices.DRIVERS)
    details.storage_handlers.extend(storage.DRIVERS)
    details.supports_seccomp = _kernel_has_seccomp()
    return reply


def _kernel_has_seccomp() -> bool:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return any(line.startswith("Seccomp:") for line in file)
    except OSError:
        return False
