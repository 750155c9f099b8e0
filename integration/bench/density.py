# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.density``: what one more idle sandbox costs, and starts at once.

Memory of a sandbox: the proportional set size of the shim, the VMM, virtiofsd and a holder or
keeper, and those blocks of the guest's memory file that no process maps, which PSS does not
count.  Beside it the fall of the host's MemAvailable, which nobody can beautify.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from integration.bench.containers import RUNTIMES, Workbench, state
from integration.bench.starts import vm_cache, wait_full
from integration.lib.containerd import DEBIAN, Containerd
from integration.lib.images import BUSYBOX_REFERENCE, busybox_image
from integration.lib.templates import Templates
from vmm.accelerator import detect

TREE = Path(__file__).resolve().parent.parent.parent
_ROUNDS = 3  # of starts at once, whose median counts: one alone is off by a fifth
_MEMORY_FILE = "/memfd:guest-memory"


@dataclass
class Cost:
    """Megabytes of all sandboxes that run.

    Attributes:
        unmapped: blocks of the guests' memory files that no process has mapped.
        available: the fall of MemAvailable since there was none.
    """

    sandboxes: int
    shim: float
    vmm: float
    virtiofsd: float
    unmapped: float
    available: float

    @property
    def total(self) -> float:
        return self.shim + self.vmm + self.virtiofsd + self.unmapped


def main(arguments: Sequence[str] | None = None) -> int:
    """Start sandboxes one by one and look at each step; then several at once."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.density")
    parser.add_argument("--sandboxes", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--kind", choices=("cold", "template", "cache"), default="template")
    parser.add_argument(
        "--ready-shims", action="store_true", help="shims are forked (with the cache always)"
    )
    parser.add_argument("--parallel", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--prefix", type=Path, default=TREE / "build/prefix")
    parser.add_argument("--output", type=Path, default=TREE / "build/bench")
    args = parser.parse_args(arguments)
    name = f"{args.kind}-ready-shims" if args.ready_shims else args.kind
    begin, load = time.monotonic(), os.getloadavg()[0]
    directory = Path(tempfile.mkdtemp(prefix="density-", dir="/run"))
    waiting = max(args.parallel, default=1) if args.kind == "cache" else 0
    templates = Templates(args.prefix, directory)
    templates.set("agent.kata", debug_console_enabled=False)
    wanted = args.kind != "cold"
    templates.set("factory", enable_template=wanted, template_path=str(templates.path))
    endpoint = directory / "cache.sock"
    templates.set("factory", vm_cache_number=waiting, vm_cache_endpoint=str(endpoint))

    def ready() -> None:
        if waiting:
            wait_full(endpoint, waiting)

    try:
        with ExitStack() as stack:
            if args.kind != "cold":
                templates.run("init")
            if waiting or args.ready_shims:
                stack.enter_context(vm_cache(args.prefix, templates.file))
            containerd = stack.enter_context(
                Containerd(
                    DEBIAN,
                    shim_path=[args.prefix / "bin"],
                    environment={"KATA_CONF_FILE": str(templates.file)},
                )
            )
            containerd.import_image(busybox_image())
            bench = Workbench(containerd)
            ready()
            bench.run("kata", "true")
            costs, stops = growth(bench, args.sandboxes, ready)
            together = {}
            for count in args.parallel:
                rounds = []
                for _ in range(_ROUNDS):
                    ready()
                    rounds.append(parallel(bench, count))
                together[count] = statistics.median(rounds)
                print(f"  {count} at once: {together[count]:.2f} s", file=sys.stderr, flush=True)
            check_kind(containerd.log, args.kind)
    finally:
        templates.run("destroy")
        shutil.rmtree(directory)
    print(report(name, costs, stops, together, detect().accelerator.value, load))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"density-{name}.json").write_text(
        json.dumps({"costs": [asdict(c) for c in costs], "stops": stops, "parallel": together})
    )
    (args.output / f"density-{name}.svg").write_text(plot(name, costs))
    print(
        f"in {args.output}: density-{name}.json, density-{name}.svg;"
        f" {time.monotonic() - begin:.0f} s",
        file=sys.stderr,
    )
    return 0


def check_kind(log: Path, kind: str) -> None:
    """Hold the starts in a shim's log to what was to be measured.

    Raises:
        RuntimeError: some VM came about in another way.
    """
    others = [
        found
        for found in re.findall(r" started: .* kind=([a-z]+)", log.read_text())
        if found != kind
    ]
    if others:
        raise RuntimeError(f"{len(others)} sandboxes were no {kind} starts but {set(others)}")


def growth(
    bench: Workbench, count: int, ready: Callable[[], None]
) -> tuple[list[Cost], list[float]]:
    """Costs after each of `count` starts; then the seconds that each took to stop.

    Args:
        ready: returns when the next may start; the VMs that wait then are no part of the fall
            of MemAvailable.
    """
    ids: list[str] = []
    costs: list[Cost] = []
    ready()
    before = psutil.virtual_memory().available
    try:
        for number in range(1, count + 1):
            container_id = bench.new_id()
            bench.containerd.ctr(
                *("run", "-d", "--runtime", RUNTIMES["kata"], BUSYBOX_REFERENCE),
                *(container_id, "sleep", "100000"),
            )
            ids.append(container_id)
            ready()
            costs.append(measure(ids, before))
            print(
                f"  {number}: {costs[-1].total / number:.1f} MB each", file=sys.stderr, flush=True
            )
    finally:
        stops = []
        for container_id in ids:
            start = time.monotonic()
            bench.containerd.ctr("task", "rm", "-f", container_id)
            stops.append(time.monotonic() - start)
            bench.containerd.ctr("container", "rm", container_id)
    return costs, stops


def measure(ids: list[str], available_before: int) -> Cost:
    """What these sandboxes cost now."""
    sizes = dict.fromkeys(("shim", "vmm", "virtiofsd"), 0.0)
    unmapped = 0.0
    for container_id in ids:
        processes = state(container_id)["processes"]
        for name, (pid, _) in processes.items():
            children = [] if name == "shim" else psutil.Process(pid).children(recursive=True)
            kind = name if name in sizes else "vmm"
            sizes[kind] += sum(_pss(p) for p in [pid, *(child.pid for child in children)]) / 1e6
        unmapped += _unmapped(processes["vmm"][0], [pid for pid, _ in processes.values()]) / 1e6
    available = (available_before - psutil.virtual_memory().available) / 1e6
    return Cost(len(ids), sizes["shim"], sizes["vmm"], sizes["virtiofsd"], unmapped, available)


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _unmapped(vmm: int, pids: list[int]) -> int:
    """Bytes of the VM's memory file less those in the PSS of who maps it."""
    blocks = 0
    for fd in Path(f"/proc/{vmm}/fd").iterdir():
        if os.readlink(fd).startswith(_MEMORY_FILE):
            blocks = fd.stat().st_blocks * 512
            break
    mapped = 0
    for pid in pids:
        inside = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                inside = _MEMORY_FILE in line
            elif inside and words[0] == "Pss:":
                mapped += int(words[1]) * 1024
    return max(0, blocks - mapped)


def parallel(bench: Workbench, count: int) -> float:
    """Seconds until `count` containers that were asked for at once have run and are gone."""
    threads = [threading.Thread(target=bench.run, args=("kata", "true")) for _ in range(count)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - start


def report(
    kind: str,
    costs: list[Cost],
    stops: list[float],
    together: dict[int, float],
    accelerator: str,
    load: float,
) -> str:
    """Tables in Markdown below a title that names the accelerator.

    Args:
        together: how many at once → seconds.
        load: of the host, before any of it.
    """
    shown = {1, 2, 5, *range(10, len(costs), 10), len(costs)}
    lines = [
        f"### Idle sandboxes, {kind}: {accelerator.upper()}, Linux {platform.release()},"
        f" {os.cpu_count()} CPUs, load {load:.1f} before it",
        "",
        "| MB of all | shim | VMM | virtiofsd | unmapped | total | per one | MemAvailable |",
        f"|{' --: |' * 8}",
    ]
    for c in costs:
        if c.sandboxes in shown:
            parts = (c.shim, c.vmm, c.virtiofsd, c.unmapped, c.total)
            cells = [str(c.sandboxes), *(f"{part:.0f}" for part in parts)]
            cells += [f"{c.total / c.sandboxes:.1f}", f"{c.available:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | |", "| --- | --: |"]
    if len(costs) > 1:
        pairs = list(itertools.pairwise(costs))
        # The middle one of all steps, which others on the host that begin or end don't move.
        total = statistics.median(after.total - c.total for c, after in pairs)
        available = statistics.median(after.available - c.available for c, after in pairs)
        lines.append(f"| one more (median) | {total:.1f} MB (MemAvailable: {available:.1f} MB) |")
    last = costs[-1]
    lines.append(f"| shim, at {last.sandboxes} | {last.shim / last.sandboxes:.1f} MB each |")
    lines.append(f"| stop and remove (median) | {statistics.median(stops):.3f} s |")
    one = together.get(1)
    for count, seconds in together.items():
        ratio = f", {seconds / one:.1f} times one" if one and count > 1 else ""
        lines.append(f"| `ctr run --rm true`, {count} at once | {seconds:.2f} s{ratio} |")
    return "\n".join(lines)


def plot(kind: str, costs: list[Cost]) -> str:
    """The growth of memory with the number of sandboxes, stacked, as an SVG."""
    width, height, left, bottom = 640, 320, 56, 36
    most = max(max(c.total, c.available) for c in costs) * 1.05
    count = max(c.sandboxes for c in costs)

    def x(number: float) -> float:
        return left + number / count * (width - left - 16)

    def y(value: float) -> float:
        return height - bottom - value / most * (height - bottom - 28)

    parts = (
        ("VMM", "#4878a8"),
        ("unmapped", "#90b0d0"),
        ("shim", "#d08048"),
        ("virtiofsd", "#70a070"),
    )
    shapes = []
    floor = [0.0] * len(costs)
    for name, colour in parts:
        tops = [f + getattr(c, name.lower()) for f, c in zip(floor, costs, strict=True)]
        points = [f"{x(c.sandboxes):.1f},{y(t):.1f}" for c, t in zip(costs, tops, strict=True)]
        points += [
            f"{x(c.sandboxes):.1f},{y(f):.1f}"
            for c, f in reversed(list(zip(costs, floor, strict=True)))
        ]
        shapes.append(f'<polygon points="{" ".join(points)}" fill="{colour}"/>')
        floor = tops
    line = " ".join(f"{x(c.sandboxes):.1f},{y(c.available):.1f}" for c in costs)
    shapes.append(f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    labels = [
        f'<text x="{left + 8 + index * 96}" y="18" fill="{colour}">{name}</text>'
        for index, (name, colour) in enumerate((*parts, ("MemAvailable", "#888")))
    ]
    for step in range(5):
        value = most * step / 4
        labels.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#888">'
            f"{value:.0f}</text>"
        )
    for number in sorted({1, count // 2, count} - {0}):
        labels.append(
            f'<text x="{x(number):.1f}" y="{height - 18}" text-anchor="middle" fill="#888">'
            f"{number}</text>"
        )
    labels.append(
        f'<text x="{width / 2:.0f}" y="{height - 4}" text-anchor="middle" fill="#888">'
        f"idle sandboxes ({kind}), MB</text>"
    )
    body = "\n".join([*shapes, *labels])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    sys.exit(main())
