# SPDX-License-Identifier: Apache-2.0
"""Tests of critest that fail here, and why."""

from __future__ import annotations

EXPECTED: dict[str, str] = {
    "HostIpc is true": "the VM's ipc namespace is not the host's",
    "HostNetwork is true": "a pod without a network namespace has loopback only",
    "portforward in host network": "a pod without a network namespace has loopback only",
    "mount with 'rshared'": "a mount made in the guest does not reach the host",
    "should support non-recursive readonly mounts": "mounts below a read-only one are read-only",
    "runtime should support MaskedPaths": "masks the stand-in's own /bin/busybox; fails with runc",
    "public image with digest": "a digest of a real image; fails with runc",
}
"""Part of a test's name → reason."""
