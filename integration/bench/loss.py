# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.loss``: what work costs in a VM, L = (1 - ours/native) x 100 %.

Native is runc, in the same run: the same program in the same image, the runtimes in turn, so that
a slow moment of the machine hits both.  Only rates are compared; of each the median counts.
The disk is measured in every way that there is to have one, all else as it is installed.
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
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from integration.bench.sides import OURS, RUNC, Setup, Side, further, side
from integration.lib.containerd import DEBIAN, Containerd
from integration.lib.host_network import HostNetwork
from integration.lib.images import Image, busybox_layer, cache_dir, oci_archive
from integration.lib.programs import build
from vmm.accelerator import detect

TREE = Path(__file__).resolve().parent.parent.parent
RUST = cache_dir() / "virtiofsd/virtiofsd"
_REFERENCE = "localhost/work:latest"
_AT_ONCE = 16
_DISK = "disk"


@dataclass(frozen=True)
class Work:
    """One row.

    Attributes:
        command: of the program `work`, with what follows seconds and place.
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
    Work("send", "network", "TCP, host to container", "MB/s"),
    Work("receive", "network", "TCP, container to host", "MB/s"),
    Work("requests 1", "network", "requests of 64 B, 1 connection", "/s"),
    Work(f"requests {_AT_ONCE}", "network", f"requests of 64 B, {_AT_ONCE} connections", "/s"),
    Work("write", _DISK, "sequential write, fsync", "MB/s"),
    Work("read", _DISK, "sequential read", "MB/s"),
    Work("read-random 1", _DISK, "random read, 4 KiB", "/s"),
    Work(f"read-random {_AT_ONCE}", _DISK, f"the same, {_AT_ONCE} at once", "/s"),
    Work("write-random 1", _DISK, "random write, 4 KiB, fdatasync", "/s"),
)
GROUPS = tuple(dict.fromkeys(work.group for work in WORKS))


@dataclass
class Row:
    """Rates of one work.

    Attributes:
        rates: name of a side → one rate a run.
    """

    work: Work
    rates: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.rates[side])

    def loss(self, side: str) -> float:
        """Percent of the native rate that is lost; negative where ours is faster."""
        return (1 - self.median(side) / self.median(RUNC.name)) * 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Let both runtimes do the same work and print what is lost."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.loss")
    parser.add_argument("--runs", type=int, default=5, help="of each rate (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run (default: 0.5)")
    parser.add_argument("--only", choices=GROUPS, action="append", help="a group of rows")
    parser.add_argument(
        "--rust-virtiofsd", type=Path, default=RUST, help=f"if there is one (default: {RUST})"
    )
    parser.add_argument("--prefix", type=Path, default=TREE / "build/prefix")
    parser.add_argument("--output", type=Path, default=TREE / "build/bench/loss.json")
    args = parser.parse_args(arguments)
    begin, load = time.monotonic(), os.getloadavg()[0]
    works = [work for work in WORKS if work.group in (args.only or GROUPS)]
    disks = [work for work in works if work.group == _DISK]
    rust = args.rust_virtiofsd if args.rust_virtiofsd.exists() else None
    program = build("work", (Path(__file__).with_name("work.c")).read_text())
    rows: list[Row] = []
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="loss-", dir="/run"))
        stack.callback(shutil.rmtree, directory)
        network = stack.enter_context(HostNetwork())
        image = Image([busybox_layer({"bin/work": program.read_bytes()})])
        archive = oci_archive(directory / "image.tar", _REFERENCE, image)
        containerd = stack.enter_context(Containerd(DEBIAN, shim_path=[args.prefix / "bin"]))
        containerd.import_image(archive)
        sides: dict[str, Side] = {}

        def start(*setups: Setup) -> None:
            for setup in setups:
                say(f"starting {setup.name}")
                sides[setup.name] = stack.enter_context(
                    side(
                        *(containerd, network, setup, len(sides) + 1),
                        image=_REFERENCE,
                        prefix=args.prefix,
                        directory=directory,
                    )
                )

        def say(text: str) -> None:
            print(f"{time.monotonic() - begin:4.0f} s  {text}", file=sys.stderr, flush=True)

        start(RUNC, OURS)
        for work in works:
            if work in disks and len(sides) == 2:
                start(*further(rust))
                for one in sides.values():  # of full length, so that each kind can be alone
                    one.run("work", "write", "0", one.file)
            say(work.title)
            rows.append(measure(work, sides, network, program, args.runs, args.seconds))
    accelerator = detect().accelerator.value
    print(report(rows, accelerator, load))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fields = {"accelerator": accelerator, "rows": [asdict(row) for row in rows]}
    args.output.write_text(json.dumps(fields, indent=1))
    print(f"as JSON: {args.output}; {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 0


def measure(
    work: Work,
    sides: dict[str, Side],
    network: HostNetwork,
    program: Path,
    runs: int,
    seconds: float,
) -> Row:
    """One work by every side, in turn."""
    row = Row(work)
    kind, *more = work.command.split()
    for _ in range(runs):
        for name, one in sides.items():
            if work.group == "network":
                client = (str(program), kind, str(seconds), one.address, *more)
                text = network.run(*client, timeout=60)
            elif work.group == _DISK:
                one.forget_file()
                text = one.run("work", kind, str(seconds), one.file, *more)
            else:
                text = one.run("work", kind, str(seconds))
            row.rates.setdefault(name, []).append(float(text))
    return row


def report(rows: list[Row], accelerator: str, load: float) -> str:
    """Tables in Markdown below a title that names the accelerator.

    Args:
        load: of the host, before any of it.
    """
    lines = [
        f"### Loss against runc: {accelerator.upper()}, Linux {platform.release()},"
        f" {os.cpu_count()} CPUs, load {load:.1f} before it",
    ]
    disks = [row for row in rows if row.work.group == _DISK]
    if others := [row for row in rows if row not in disks]:
        lines += ["", "| | runc | ours | loss |", "| --- | --: | --: | --: |"]
        for row in others:
            ours = f"{number(row.median(OURS.name))} | {row.loss(OURS.name):.0f} %"
            lines.append(
                f"| {row.work.title} [{row.work.unit}] | {number(row.median(RUNC.name))} | {ours} |"
            )
    if disks:
        titles = [f"{row.work.title} [{row.work.unit}]" for row in disks]
        lines += ["", f"| disk | {' | '.join(titles)} |", f"| --- |{' --: |' * len(disks)}"]
        for name in disks[0].rates:
            cells = [
                number(row.median(name))
                + (f" ({row.loss(name):.0f} %)" if name != RUNC.name else "")
                for row in disks
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [
            "",
            "Of the disk: rate (loss). The first row of each kind is as installed: virtio-fs with"
            " cache `auto` and a queue of 1024, virtio-blk with a queue of 128; the others differ"
            " in what they name.",
        ]
    if accelerator == "tcg":
        lines += [
            "",
            "Under TCG every instruction of the guest is translated: the rows of CPU, memory and"
            " kernel say nothing about KVM, where the guest's instructions run as they are.",
        ]
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
