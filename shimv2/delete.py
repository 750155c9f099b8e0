# SPDX-License-Identifier: Apache-2.0
"""``containerd-shim-kata-v2 delete``: end from outside what a shim no longer ends itself.

containerd runs it after each container, and when a shim is lost.  It is idempotent.
"""

from __future__ import annotations

import os
import sys
import time

from shimv2 import state
from shimv2.bootstrap import delete_response
from shimv2.cli import group_of

KILLED_STATUS = 137  # 128 + SIGKILL, as runc's shim and Kata report it


def delete(container_id: str, namespace: str, bundle: str) -> bytes:
    """End container `container_id`: with its VM if it is the sandbox's own container.

    Returns:
        A serialized DeleteResponse for stdout.  What could not be removed goes to stderr,
        which containerd logs as a warning.
    """
    pid = 0
    if group_of(bundle, container_id) == container_id:
        record = state.SandboxRecord.load(container_id)
        # The same id may be another namespace's: that sandbox is none of our business.
        if record is not None and record.namespace == namespace:
            pid = record.processes.get("vmm", (0, 0))[0]
            for problem in state.remove_sandbox(container_id, namespace):
                sys.stderr.write(f"left behind: {problem}\n")
    rootfs = os.path.join(bundle, "rootfs")
    if os.path.ismount(rootfs):
        from pathlib import Path

        from shimv2.mounts import umount_detached

        umount_detached(Path(rootfs))
    return delete_response(pid, KILLED_STATUS, time.time_ns())
