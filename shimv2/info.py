# SPDX-License-Identifier: Apache-2.0
"""``containerd-shim-kata-v2 -info``: what containerd asks once before the first task."""

from __future__ import annotations

import json

from shimv2.api import introspection_pb2
from shimv2.bootstrap import MOUNT_TRANSFORMS, MOUNT_TYPES
from shimv2.version import RUNTIME_NAME, VERSION

ALLOWED_MOUNTS = "containerd.io/runtime-allow-mounts"
FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
FEATURES = {
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.2.0",
    # With `rro` the CRI plugin offers recursive read-only mounts; our read-only ones all are.
    "mountOptions": [
        *("bind", "rbind", "ro", "rro", "rw", "nosuid", "nodev", "noexec", "noatime"),
        *("private", "rprivate", "slave", "rslave"),
    ],
    "linux": {"mountExtensions": {"idmap": {"enabled": False}}},
}
"""Runtime-spec, features-linux.md; as much as containerd reads of it."""


def runtime_info() -> bytes:
    """A serialized containerd.types.RuntimeInfo."""
    info = introspection_pb2.RuntimeInfo(name=RUNTIME_NAME)
    info.version.version = VERSION
    info.annotations[ALLOWED_MOUNTS] = ",".join(
        (*MOUNT_TYPES, *(f"{t}/*" for t in MOUNT_TRANSFORMS))
    )
    info.features.type_url = FEATURES_TYPE
    info.features.value = json.dumps(FEATURES).encode()
    return info.SerializeToString()
