# SPDX-License-Identifier: Apache-2.0
"""``containerd-shim-kata-v2 -info``: what containerd asks once before the first task."""

from __future__ import annotations

from shimv2.api import introspection_pb2
from shimv2.version import RUNTIME_NAME, VERSION


def runtime_info() -> bytes:
    """A serialized containerd.types.RuntimeInfo."""
    info = introspection_pb2.RuntimeInfo(name=RUNTIME_NAME)
    info.version.version = VERSION
    return info.SerializeToString()
