# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.loss``: what work costs in a VM, L = (1 - ours/native) x 100 %.

Native is runc, in the same run: the same program in the same image, the runtimes in turn, so that
a slow moment of the machine hits both.  Only rates are compared; of each the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from integration.bench.containers import RUNTIMES, state
from integration.lib.containerd import DEBIAN, Containerd
from integration.lib.host_network import HostNetwork
from integration.lib.images import Image, busybox_layer, oci_archive
from integration.lib.kata import wait_until
from integration.lib.programs import build
from integration.lib.templates import without_templates
from vmm.accelerator import detect

TREE = Path(__file__).resolve().parent.parent.parent
_REFERENCE = "localhost/work:latest"
_CONNECTIONS = 16
_FILE = "measured"
CACHES = ("never", "metadata", "auto", "always")


@dataclass(frozen=True)
class Work:
    """One row.

    Attributes:
        command: of the program `work`.
        group: ``cpu``, ``memory``, ``kernel``, ``disk`` or ``network``.
        unit: of its rate.
    """

    command: str
    group: str
    title: str
    unit: str


WORKS = (
    Work("int", "cpu", "CPU, integer", "Mops/s"),
    Work("float", "cpu", "CPU, floating point", "Mflop/s"),
    Work("copy", "memory", "memory bandwidth (memcpy)", "MB/s"),
    Work("chase", "memory", "memory latency (dependent loads)", "M/s"),
    Work("syscall", "kernel", "system calls (getppid)", "/s"),
    Work("switch", "kernel", "pipe round trips of two processes", "/s"),
    Work("fork", "kernel", "fork, exit, wait", "/s"),
    Work("write", "disk", "sequential write, fsync", "MB/s"),
    Work("read", "disk", "sequential read", "MB/s"),
    Work("read-random", "disk", "random read, 4 KiB", "/s"),
    Work("write-random", "disk", "random write, 4 KiB, fdatasync", "/s"),
    Work("send", "network", "TCP, host to container", "MB/s"),
    Work("receive", "network", "TCP, container to host", "MB/s"),
    Work("requests 1", "network", "requests of 64 B, 1 connection", "/s"),
    Work(
        f"requests {_CONNECTIONS}", "network", f"requests of 64 B, {_CONNECTIONS} connections", "/s"
    ),
)
GROUPS = tuple(dict.fromkeys(work.group for work in WORKS))


@dataclass
class Row:
    """Rates of one work.

    Attributes:
        rates: side (``runc``, ``kata``, ``kata never`` …) → one rate a run.
    """

    work: Work
    rates: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.rates[side])

    def loss(self, side: str) -> float:
        """Percent of the native rate that is lost; negative where ours is faster."""
        return (1 - self.median(side) / self.median("runc")) * 100


class Side:
    """One container of one runtime that works when it is told to.

    Attributes:
        address: of it on the network, "" without one.
    """

    def __init__(self, containerd: Containerd, name: str, container_id: str, address: str) -> None:
        self._containerd = containerd
        self._name = name
        self._id = container_id
        self.address = address
        self._count = 0

    def run(self, *command: str) -> str:
        """An exec's output."""
        self._count += 1
        return self._containerd.ctr(
            *("task", "exec", "--exec-id", f"e{self._count}", self._id, *command), timeout=600
        ).stdout

    def forget_file(self) -> None:
        """Drop the measured file from the host's page cache; who works drops it from its own."""
        fd = os.open(self._rootfs() / _FILE, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _rootfs(self) -> Path:
        if self._name == "runc":
            lines = self._containerd.ctr("task", "ps", self._id).stdout.splitlines()
            return Path(f"/proc/{lines[1].split()[0]}/root")
        return Path(f"/proc/{state(self._id)['processes']['virtiofsd'][0]}/root/{self._id}/rootfs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Let both runtimes do the same work and print what is lost."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.loss")
    parser.add_argument("--runs", type=int, default=5, help="of each row (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run (default: 1)")
    parser.add_argument("--only", choices=GROUPS, action="append", help="a group of rows")
    parser.add_argument(
        "--cache",
        choices=CACHES,
        nargs="*",
        default=[],
        help="further columns for the disk: these values of virtio_fs_cache",
    )
    parser.add_argument("--prefix", type=Path, default=TREE / "build/prefix")
    parser.add_argument("--output", type=Path, default=TREE / "build/bench/loss.json")
    args = parser.parse_args(arguments)
    works = [work for work in WORKS if work.group in (args.only or GROUPS)]
    program = build("work", (Path(__file__).with_name("work.c")).read_text())
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="loss-", dir="/run"))
        stack.callback(shutil.rmtree, directory)
        network = stack.enter_context(HostNetwork())
        image = Image([busybox_layer({"bin/work": program.read_bytes()})])
        archive = oci_archive(directory / "image.tar", _REFERENCE, image)
        containerd = stack.enter_context(Containerd(DEBIAN, shim_path=[args.prefix / "bin"]))
        containerd.import_image(archive)
        sides = {}
        configurations = {"runc": "", "kata": "auto", **{f"kata {c}": c for c in args.cache}}
        for number, (name, cache) in enumerate(configurations.items(), 1):
            flags = ["--runtime", RUNTIMES[name.partition(" ")[0]]]
            if cache:
                flags += ["--runtime-config-path", _configuration(args.prefix, directory, cache)]
            sides[name] = stack.enter_context(_side(containerd, network, name, number, flags))
        rows = measure(works, sides, network, program, args.runs, args.seconds)
    accelerator = detect().accelerator.value
    print(report(rows, accelerator))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fields = {"accelerator": accelerator, "rows": [asdict(row) for row in rows]}
    args.output.write_text(json.dumps(fields, indent=1))
    print(f"as JSON: {args.output}")
    return 0


def _configuration(prefix: Path, directory: Path, cache: str) -> str:
    own = directory / cache
    (own / "config.d").mkdir(parents=True)
    (own / "configuration.toml").write_text(without_templates(prefix).read_text())
    (own / "config.d/loss.toml").write_text(f'[hypervisor.qemu]\nvirtio_fs_cache = "{cache}"\n')
    return str(own / "configuration.toml")


@contextmanager
def _side(
    containerd: Containerd, network: HostNetwork, name: str, number: int, flags: list[str]
) -> Iterator[Side]:
    """A container that serves, in a namespace of its own with a veth pair to `network`."""
    container_id = f"loss-{number}"
    with HostNetwork() as pod:
        address = f"10.99.{number}.2"
        peer = ("type", "veth", "peer", "name", "eth0", "netns", pod.name)
        network.run("ip", "link", "add", f"pod{number}", *peer)
        network.run("ip", "address", "add", f"10.99.{number}.1/24", "dev", f"pod{number}")
        network.run("ip", "link", "set", f"pod{number}", "up")
        pod.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        pod.run("ip", "link", "set", "eth0", "up")
        try:
            containerd.ctr(
                *("run", "-d", "--with-ns", f"network:{pod.path}", *flags, _REFERENCE),
                *(container_id, "work", "serve"),
            )
            side = Side(containerd, name, container_id, address)
            wait_until(lambda: ":19 " in side.run("netstat", "-ltn"), 30, "the server listens")
            yield side
        finally:
            containerd.ctr("task", "rm", "-f", container_id, check=False)
            containerd.ctr("container", "rm", container_id, check=False)


def measure(
    works: Sequence[Work],
    sides: dict[str, Side],
    network: HostNetwork,
    program: Path,
    runs: int,
    seconds: float,
) -> list[Row]:
    """Every work by every side; a further side works on the disk only."""
    rows = []
    for work in works:
        print(f"  {work.title}", file=sys.stderr, flush=True)
        row = Row(work)
        kind, *more = work.command.split()
        concerned = {n: s for n, s in sides.items() if work.group == "disk" or " " not in n}
        for side in concerned.values():
            if work.group == "disk":  # a file of full length, so that each kind can be alone
                side.run("work", "write", "0", f"/{_FILE}")
        for _ in range(runs):
            for name, side in concerned.items():
                if work.group == "network":
                    client = (str(program), kind, str(seconds), side.address, *more)
                    text = network.run(*client, timeout=60)
                elif work.group == "disk":
                    side.forget_file()
                    text = side.run("work", kind, str(seconds), f"/{_FILE}")
                else:
                    text = side.run("work", kind, str(seconds))
                row.rates.setdefault(name, []).append(float(text))
        rows.append(row)
    return rows


def report(rows: list[Row], accelerator: str) -> str:
    """A table in Markdown, whose title names the accelerator."""
    further = list(dict.fromkeys(n for row in rows for n in row.rates if n != "runc"))
    lines = [
        f"### Loss against runc: {accelerator.upper()}, Linux {platform.release()},"
        f" {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "",
        "| | runc | " + " | ".join(f"{name} | loss" for name in further) + " |",
        "| --- | --- |" + " --- | --- |" * len(further),
    ]
    for row in rows:
        cells = [f"{row.work.title} [{row.work.unit}]", number(row.median("runc"))]
        for name in further:
            known = name in row.rates
            cells += [number(row.median(name)), f"{row.loss(name):.0f} %"] if known else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Medians. The disk is a virtio-fs share: no block device reaches a container yet.",
    ]
    if accelerator == "tcg":
        lines.append(
            "Under TCG every instruction of the guest is translated: the rows of CPU, memory and"
            " kernel say nothing about KVM, where the guest's instructions run as they are."
        )
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
