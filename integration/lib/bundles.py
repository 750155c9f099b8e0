# SPDX-License-Identifier: Apache-2.0
"""OCI specs of one's own, for `ctr run --config`: hooks, odd fields, broken ones."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from integration.lib.images import busybox_layer


def unpack_busybox(directory: Path) -> Path:
    """The busybox root file system as a plain directory."""
    rootfs = directory / "rootfs"
    rootfs.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(busybox_layer())) as tar:
        tar.extractall(rootfs)
    return rootfs


def spec(rootfs: Path, *command: str, **changes: Any) -> dict[str, Any]:
    """A small container; `changes` replace top-level fields, `process` and `linux` are merged."""
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(command),
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                kind: ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
                for kind in ("bounding", "effective", "permitted")
            },
        },
        "root": {"path": str(rootfs)},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
        },
    }
    for name in ("process", "linux"):
        document[name] |= changes.pop(name, {})
    return document | changes


def write(path: Path, document: object) -> Path:
    """The document as a file."""
    path.write_text(json.dumps(document))
    return path
