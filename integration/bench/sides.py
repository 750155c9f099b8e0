# SPDX-License-Identifier: Apache-2.0
"""The containers that work beside each other: by runc, and by our runtime as it can be configured.

Where the disk is a share the measured file lies in the root file system.  Where it is a block
device it lies in a direct-assigned volume, which the guest mounts, made in a file of the same
file system of the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from integration.bench.containers import RUNTIMES, state
from integration.lib.configuration import Configuration
from integration.lib.containerd import Containerd
from integration.lib.disks import ext4, record
from integration.lib.host_network import HostNetwork
from integration.lib.kata import wait_until
from shimv2 import direct_volumes

_FILE = "measured"
_VOLUME = "/volume"
_DISK_SIZE = 256 << 20


@dataclass(frozen=True)
class Setup:
    """How a container is run.

    Attributes:
        runtime: a key of `RUNTIMES`.
        block: whether the disk is a block device, and no share.
        hypervisor: keys of ``[hypervisor.qemu]`` that differ from those installed.
    """

    name: str
    runtime: str = "kata"
    block: bool = False
    hypervisor: Mapping[str, str | int | bool] = field(default_factory=dict)


RUNC = Setup("runc", "runc")
OURS = Setup("virtio-fs")


def further(rust: Path | None) -> list[Setup]:
    """Other ways to have a disk.

    Args:
        rust: the virtiofsd in Rust, if there is one; the one in C has no cache mode `metadata`.
    """

    def share(name: str, **keys: str | int) -> Setup:
        return Setup(f"virtio-fs, {name}", hypervisor=keys)

    def block(name: str, **keys: str | int | bool) -> Setup:
        return Setup(f"virtio-blk{name}", block=True, hypervisor=keys)

    shares = [share(f"cache {mode}", virtio_fs_cache=mode) for mode in ("never", "always")]
    shares += [share(f"queue {size}", virtio_fs_queue_size=size) for size in (16, 128)]
    if rust is not None:
        shares += [
            share(
                f"virtiofsd in Rust, cache {mode}", virtio_fs_cache=mode, virtio_fs_daemon=str(rust)
            )
            for mode in ("auto", "metadata")
        ]
    return [
        *shares,
        block(""),
        *(block(f", queue {size}", queue_size=size) for size in (16, 1024)),
        block(", O_DIRECT", block_device_cache_set=True, block_device_cache_direct=True),
    ]


class Side:
    """One container that works when it is told to.

    Attributes:
        address: of it on the network.
        file: whose reading and writing is measured, as the container names it.
    """

    def __init__(
        self, containerd: Containerd, container_id: str, address: str, disk: Path | None
    ) -> None:
        self._containerd = containerd
        self._id = container_id
        self.address = address
        self._disk = disk
        self.file = f"{_VOLUME}/{_FILE}" if disk else f"/{_FILE}"
        self._count = 0

    def run(self, *command: str) -> str:
        """An exec's output."""
        self._count += 1
        return self._containerd.ctr(
            *("task", "exec", "--exec-id", f"e{self._count}", self._id, *command), timeout=600
        ).stdout

    def forget_file(self) -> None:
        """Drop the measured file from the host's page cache; who works drops it from its own."""
        fd = os.open(self._disk or self._rootfs() / _FILE, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _rootfs(self) -> Path:
        if Path("/run/vc/sbs", self._id).exists():
            pid = state(self._id)["processes"]["virtiofsd"][0]
            return Path(f"/proc/{pid}/root/{self._id}/rootfs")
        lines = self._containerd.ctr("task", "ps", self._id).stdout.splitlines()
        return Path(f"/proc/{lines[1].split()[0]}/root")


@contextmanager
def side(
    containerd: Containerd,
    network: HostNetwork,
    setup: Setup,
    number: int,
    *,
    image: str,
    prefix: Path,
    directory: Path,
) -> Iterator[Side]:
    """A container that serves, in a namespace of its own with a veth pair to `network`.

    Args:
        number: of this side: a part of its address and id.
        image: reference of one with the program `work`.
        directory: for configurations and disks.
    """
    container_id = f"loss-{os.getpid()}-{number}"
    address = f"10.99.{number}.2"
    flags: list[str | Path] = ["--runtime", RUNTIMES[setup.runtime]]
    with ExitStack() as stack:
        pod = stack.enter_context(HostNetwork())
        _connect(network, pod, number, address)
        own = directory / str(number)
        disk = None
        if setup.runtime == "kata":
            configuration = Configuration(prefix, own)
            configuration.set("factory", enable_template=False)
            configuration.set("hypervisor.qemu", **setup.hypervisor)
            flags += configuration.flags
        if setup.block:
            disk = stack.enter_context(_volume(own))
            flags += ["--mount", f"type=bind,src={own / 'v'},dst={_VOLUME},options=rbind:rw"]
        stack.callback(_remove, containerd, container_id)
        containerd.ctr(
            *("run", "-d", "--with-ns", f"network:{pod.path}", *flags, image),
            *(container_id, "work", "serve"),
        )
        made = Side(containerd, container_id, address, disk)
        wait_until(lambda: ":19 " in made.run("netstat", "-ltn"), 30, "the server listens")
        yield made


def _connect(network: HostNetwork, pod: HostNetwork, number: int, address: str) -> None:
    peer = ("type", "veth", "peer", "name", "eth0", "netns", pod.name)
    network.run("ip", "link", "add", f"pod{number}", *peer)
    network.run("ip", "address", "add", f"10.99.{number}.1/24", "dev", f"pod{number}")
    network.run("ip", "link", "set", f"pod{number}", "up")
    pod.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
    pod.run("ip", "link", "set", "eth0", "up")


@contextmanager
def _volume(own: Path) -> Iterator[Path]:
    """A direct-assigned volume at ``v`` below a directory; gives the file that is its disk."""
    disk = ext4(own / "disk", _DISK_SIZE)
    point = own / "v"
    point.mkdir()
    direct_volumes.add(str(point), record(disk))
    try:
        yield disk
    finally:
        direct_volumes.remove(str(point))


def _remove(containerd: Containerd, container_id: str) -> None:
    containerd.ctr("task", "rm", "-f", container_id, check=False)
    containerd.ctr("container", "rm", container_id, check=False)
