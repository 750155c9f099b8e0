# SPDX-License-Identifier: Apache-2.0
"""``containerd-shim-kata-v2 -info``: what containerd asks once before the first task."""

from __future__ import annotations

from shimv2.api import introspection_pb2
from shimv2.version import RUNTIME_NAME, VERSION

ALLOWED_MOUNTS = "containerd.io/runtime-allow-mounts"
MOUNT_TYPES = ("erofs",)
"""Left to us instead of being mounted by containerd's mount manager (2.2 and later)."""
TRANSFORMS = ("format", "mkdir")
"""Prefixes of mount types that we apply ourselves; ``mkfs`` containerd does before."""


def runtime_info() -> bytes:
    """A serialized containerd.types.RuntimeInfo."""
    info = introspection_pb2.RuntimeInfo(name=RUNTIME_NAME)
    info.version.version = VERSION
    info.annotations[ALLOWED_MOUNTS] = ",".join((*MOUNT_TYPES, *(f"{t}/*" for t in TRANSFORMS)))
    return info.SerializeToString()
