# SPDX-License-Identifier: Apache-2.0
"""A containerd of one's own with its CRI plugin, and `crictl` for it.

::

    with CriNode(edition, prefix) as node:
        pod = node.run_pod()
        container = node.start_container(pod, "sleep", "1000")
        print(node.execute(container, "ip", "address"))
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from integration.lib import cni
from integration.lib.configuration import installed
from integration.lib.containerd import RUNTIME, Containerd, Edition
from integration.lib.crictl import Crictl
from integration.lib.host_network import HostNetwork
from integration.lib.images import BUSYBOX_REFERENCE, Image, busybox_image
from integration.lib.registry import Registry

NAMESPACE = "k8s.io"

HANDLERS = {
    "kata": "",
    "kata-static": "[runtime]\nstatic_sandbox_resource_mgmt = true\n",
    "kata-elastic": """\
[factory]
enable_template = false
[hypervisor.qemu]
enable_virtio_mem = true
reclaim_guest_freed_memory = true
""",
    "kata-alone": "[runtime]\nsandbox_cgroup_only = true\n",
    # A shell of the guest, and a second QMP socket.
    "kata-debug": """\
[factory]
enable_template = false
[agent.kata]
debug_console_enabled = true
[hypervisor.qemu]
enable_debug = true
""",
}
"""Runtime classes of each node, and what their configuration overrules."""


class CriNode(Crictl):
    """One node: a host network of its own, a containerd in it, its pods.

    Args:
        configuration: the runtime's configuration.toml.
        network: makes the CNI configuration list of the pods; it gets the node's directory.
        sandboxer: "podsandbox", or "shim" for the Sandbox API (containerd 2.x).
        images: ``repository:tag`` → image, to be pulled from whatever registry.
        sandbox_image: reference of the pause container's.
    """

    def __init__(
        self,
        edition: Edition,
        prefix: Path,
        *,
        configuration: Path | None = None,
        network: Callable[[Path], dict[str, Any]] = cni.bridge,
        sandboxer: str = "podsandbox",
        images: dict[str, Image] | None = None,
        sandbox_image: str = BUSYBOX_REFERENCE,
    ) -> None:
        self.sandboxer = sandboxer
        self._images = images
        self.host = HostNetwork()
        self._network = network
        self._stack = contextlib.ExitStack()
        containerd = Containerd(
            edition,
            shim_path=[prefix / "bin"],
            cri=True,
            launcher=self.host.launcher,
        )
        directory = containerd.directory
        super().__init__(containerd, directory, directory / "state", self.host.launcher)
        self._configuration = configuration or installed(prefix)
        self.containerd.extra_config = _cri_config(self.directory, sandboxer, sandbox_image)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.host)
            stack.callback(self.containerd.close)
            # As under systemd: what containerd mounts is seen in the shims' mount namespaces.
            stack.enter_context(_shared(self.directory))
            self._write_handlers()
            (self.directory / "net.d").mkdir()
            (self.directory / "net.d" / "10-pods.conflist").write_text(
                json.dumps(self._network(self.directory))
            )
            if self._images is not None:
                registry = stack.enter_context(Registry(self.host, self._images))
                registry.write_hosts(self.directory / "registries")
            self.containerd.start()
            stack.callback(self.remove_pods)
            self.containerd.import_image(busybox_image(), namespace=NAMESPACE)
            self.wait_ready()
            self._stack = stack.pop_all()
        return self

    def _write_handlers(self) -> None:
        for name, changes in HANDLERS.items():
            directory = self.directory / "handlers" / name
            (directory / "config.d").mkdir(parents=True)
            (directory / "config.d" / "handler.toml").write_text(changes)
            file = directory / "configuration.toml"
            file.write_text(self._configuration.read_text())
            for drop_in in self._configuration.parent.glob("config.d/*.toml"):
                (directory / "config.d" / drop_in.name).write_text(drop_in.read_text())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


@contextlib.contextmanager
def _shared(directory: Path) -> Iterator[None]:
    for options in (["--bind", directory], ["--make-shared"]):
        subprocess.run(["mount", *options, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def _cri_config(directory: Path, sandboxer: str, sandbox_image: str) -> str:
    plugin = 'plugins."io.containerd.grpc.v1.cri"'
    # Only 2.x knows this key; 1.6 says so in its log and goes on.
    choice = f'  sandboxer = "{sandboxer}"\n' if sandboxer != "podsandbox" else ""
    return f"""\
[{plugin}]
  sandbox_image = "{sandbox_image}"
  # Without CAP_SYS_RESOURCE no process may get an oom_score_adj below its parent's.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
[{plugin}.registry]
  config_path = "{directory}/registries"
[{plugin}.cni]
  bin_dir = "{cni.CNI_PLUGINS}"
  conf_dir = "{directory}/net.d"
[{plugin}.containerd]
  default_runtime_name = "kata"
[{plugin}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
""" + "".join(
        f"""\
[{plugin}.containerd.runtimes.{name}]
  runtime_type = "{RUNTIME}"
  pod_annotations = ["io.katacontainers.*"]
  privileged_without_host_devices = true
{choice}[{plugin}.containerd.runtimes.{name}.options]
  ConfigPath = "{directory}/handlers/{name}/configuration.toml"
"""
        for name in HANDLERS
    )
