# SPDX-License-Identifier: Apache-2.0
"""The system's containerd as a Kubernetes node has it: CRI, CNI, systemd's cgroup driver."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration.kvmlab.suite.system import CONFIGURATION, SystemContainerd
from integration.lib.cni import CNI_PLUGINS
from integration.lib.containerd import RUNTIME
from integration.lib.cri import NAMESPACE
from integration.lib.crictl import Crictl
from integration.lib.images import BUSYBOX_REFERENCE, busybox_image

CONTAINERD_CONFIG = Path("/etc/containerd/config.toml")
_NETWORKS = Path("/etc/cni/net.d")
_UNITS = Path("/run/systemd/system")
_OF_CONTAINER = 1  # NamespaceMode CONTAINER

PLUGIN = 'plugins."io.containerd.grpc.v1.cri"'
RUNTIMES = f"""\
version = 2
[{PLUGIN}]
  sandbox_image = "{BUSYBOX_REFERENCE}"
  netns_mounts_under_state_dir = true
[{PLUGIN}.cni]
  bin_dir = "{CNI_PLUGINS}"
  conf_dir = "{_NETWORKS}"
[{PLUGIN}.containerd.runtimes.kata]
  runtime_type = "{RUNTIME}"
  pod_annotations = ["io.katacontainers.*"]
  privileged_without_host_devices = true
[{PLUGIN}.containerd.runtimes.kata.options]
  ConfigPath = "{CONFIGURATION}"
[{PLUGIN}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{PLUGIN}.containerd.runtimes.runc.options]
  SystemdCgroup = true
"""


@contextmanager
def configured(system: SystemContainerd, config: str) -> Iterator[None]:
    """The system's containerd, restarted with a configuration; with the former one afterwards."""
    before = CONTAINERD_CONFIG.read_text()
    CONTAINERD_CONFIG.write_text(config)
    try:
        system.restart()
        yield
    finally:
        CONTAINERD_CONFIG.write_text(before)
        system.restart()


@contextmanager
def node_of(system: SystemContainerd, network: dict[str, Any]) -> Iterator[Crictl]:
    """Pods on one network; with none left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="pykata-", dir="/run"))
    _NETWORKS.mkdir(parents=True, exist_ok=True)
    (_NETWORKS / "10-pods.conflist").write_text(json.dumps(network))
    with configured(system, RUNTIMES):
        client = Crictl(system, directory, Path("/run/containerd"))
        system.import_image(busybox_image(), namespace=NAMESPACE)
        client.wait_ready()
        try:
            yield client
        finally:
            client.remove_pods()


def slice_of_pod(name: str, settings: str = "") -> dict[str, Any]:
    """A slice as a kubelet makes one for a pod.

    Returns:
        What PodSandboxConfig has to say in `linux`.
    """
    unit = _UNITS / name
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text(f"[Slice]\nCPUAccounting=yes\nMemoryAccounting=yes\n{settings}")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "start", name], check=True)
    return {
        "cgroup_parent": name,
        "security_context": {"namespace_options": {"pid": _OF_CONTAINER}},
    }
