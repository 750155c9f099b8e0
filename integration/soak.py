# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.soak``: many pods and thousands of execs, and what is left of them.

Shows how far it is on stderr and prints a table of figures.  Ends with 1 if something was left
behind, grew without end, or was larger than it may be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from integration.conftest import TREE, edition_named
from integration.lib.cri import CriNode
from integration.lib.crictl import Crictl, CrictlError
from integration.lib.templates import Templates

_SHIM_MIB = 45.0
_CONTAINER_MIB = 1.0  # more for each
_GROWTH_MIB = 4.0  # of shim or agent over all execs: allocators keep a little
_SAMPLES = 20  # of the processes, during the execs
_WARM_UP = 20  # execs, after which caches are as full as they get
_PROCESSES = ("shim", "vmm", "virtiofsd")


@dataclass
class Report:
    """Figures for the table, and what was wrong."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def row(self, name: str, value: str) -> None:
        self.rows.append((name, value))

    def check(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)
            _say(f"PROBLEM: {problem}")

    def text(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:{width}}  {value}" for name, value in self.rows]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join(lines)


@dataclass(frozen=True)
class Sample:
    """Memory in MiB and open descriptors of a pod's processes, by their names."""

    memory: dict[str, float]
    descriptors: dict[str, int]


def main() -> int:
    """Run pods and execs until something gives way."""
    parser = argparse.ArgumentParser(prog="python -m integration.soak", description=main.__doc__)
    parser.add_argument("--pods", type=int, default=30, help="one after the other (default: 30)")
    parser.add_argument("--at-once", type=int, default=8, help="pods at once (default: 8)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 3, 10], help="containers a pod")
    parser.add_argument("--execs", type=int, default=3600, help="in one container (default: 3600)")
    parser.add_argument("--edition", choices=("debian", "go"), default="go", help="of containerd")
    parser.add_argument("--sandboxer", choices=("podsandbox", "shim"), default="podsandbox")
    parser.add_argument("--prefix", type=Path, default=TREE / "build/prefix")
    args = parser.parse_args()
    report = Report()
    with template(args.prefix) as configuration:
        node = CriNode(
            edition_named(args.edition),
            args.prefix,
            configuration=configuration,
            sandboxer=args.sandboxer,
        )
        with node:
            steps: list[Callable[[], None]] = [
                lambda: one_by_one(node, report, args.pods),
                lambda: at_once(node, report, args.at_once),
                *(partial(pod_of, node, report, size) for size in args.sizes),
                lambda: execs(node, report, args.execs, args.prefix / "bin/kata-runtime"),
            ]
            for step in steps:
                try:
                    step()
                except CrictlError as error:
                    report.check(False, str(error))
                    _check_left(node, report, "the step that failed")
    print(report.text())
    return 1 if report.problems else 0


@contextmanager
def template(prefix: Path) -> Iterator[Path]:
    """A configuration with a template of its own, which is ready."""
    directory = Path(tempfile.mkdtemp(prefix="soak-", dir="/run"))
    templates = Templates(prefix, directory)
    _say("making a template")
    try:
        done = templates.command("init")
        if done.returncode:
            raise SystemExit(done.stderr)
        yield templates.file
    finally:
        templates.command("destroy")
        shutil.rmtree(directory)


def one_by_one(node: Crictl, report: Report, count: int) -> None:
    """Pods of one container, each removed before the next."""
    seconds = []
    for number in _counted(range(count), "pod", count):
        begin = time.monotonic()
        pod = node.run_pod()
        container = node.start_container(pod, "sleep", "1000")
        seconds.append(time.monotonic() - begin)
        report.check(node.execute(container, "echo", "hi") == "hi\n", f"exec in pod {number}")
        node.remove_pod(pod)
        _check_left(node, report, f"pod {number}")
    if seconds:
        median = sorted(seconds)[len(seconds) // 2]
        report.row(f"{count} pods one by one", f"ready in {median:.2f} s (median)")


def at_once(node: Crictl, report: Report, count: int) -> None:
    """So many pods that begin, live and end together."""
    if not count:
        return
    _say(f"{count} pods at once")
    begin = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        pods = list(pool.map(lambda _: node.run_pod(), range(count)))
        containers = list(pool.map(lambda pod: node.start_container(pod, "sleep", "1000"), pods))
        ready = time.monotonic() - begin
        addresses = {node.address(pod) for pod in pods}
        report.check(len(addresses) == count, f"{len(addresses)} addresses for {count} pods")
        said = set(pool.map(lambda container: node.execute(container, "echo", "hi"), containers))
        report.check(said == {"hi\n"}, "an exec in one of the pods at once")
        list(pool.map(node.remove_pod, pods))
    _check_left(node, report, f"{count} pods at once")
    report.row(f"{count} pods at once", f"all ready in {ready:.1f} s")


def pod_of(node: Crictl, report: Report, size: int) -> None:
    """One pod with so many containers, and how large its shim is."""
    _say(f"a pod of {size}")
    pod = node.run_pod()
    containers = [node.start_container(pod, "sleep", "1000") for _ in range(size)]
    for container in containers:
        node.execute(container, "true")
    memory = _sample(pod).memory
    limit = _SHIM_MIB + _CONTAINER_MIB * size
    report.row(f"pod of {size}", ", ".join(f"{n} {m:.1f} MiB" for n, m in memory.items()))
    report.check(memory["shim"] <= limit, f"shim of a pod of {size}: above {limit:.0f} MiB")
    node.remove_pod(pod)
    _check_left(node, report, f"the pod of {size}")


def execs(node: Crictl, report: Report, count: int, kata_runtime: Path) -> None:
    """Execs in one container, one after the other: nothing may grow with them."""
    if not count:
        return
    pod = node.run_pod()
    container = node.start_container(pod, "sleep", "1000")

    def look() -> Sample:
        sample = _sample(pod)
        sample.memory["agent"] = _agent_mib(kata_runtime, pod)
        return sample

    for _ in range(_WARM_UP):
        node.crictl("exec", "-s", container, "true")
    look()  # loads what asking needs
    first = last = look()
    begin = time.monotonic()
    for number in _counted(range(1, count + 1), "exec", count):
        node.crictl("exec", "-s", container, "true")
        if number % max(1, count // _SAMPLES) == 0:
            last = look()
            _say(f"  {_describe(first, last)}")
    rate = (time.monotonic() - begin) / count
    report.row(f"{count} execs", f"{rate * 1000:.0f} ms each")
    last = look()
    report.row("  growth", _describe(first, last))
    for name in ("shim", "agent"):
        grown = last.memory[name] - first.memory[name]
        report.check(grown <= _GROWTH_MIB, f"{name} grew by {grown:.1f} MiB in {count} execs")
    report.check(
        last.descriptors == first.descriptors,
        f"descriptors: {first.descriptors} before {count} execs, {last.descriptors} after",
    )
    states = node.execute(container, "ps", "-o", "stat").split()
    report.check(not any("Z" in state for state in states), "zombies in the container")
    node.remove_pod(pod)
    _check_left(node, report, f"{count} execs")


def _sample(pod: str) -> Sample:
    record = json.loads(Path("/run/vc/sbs", pod, "state.json").read_text())
    pids = {name: record["processes"][name][0] for name in _PROCESSES}
    return Sample(
        {name: _pss_mib(pid) for name, pid in pids.items()},
        {name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()},
    )


def _pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no Pss")


def _agent_mib(kata_runtime: Path, pod: str) -> float:
    done = subprocess.run([kata_runtime, "metrics", pod], check=True, capture_output=True)
    found = re.search(rb"^kata_agent_total_rss (\S+)", done.stdout, re.M)
    if found is None:
        raise RuntimeError("the sandbox's metrics have no kata_agent_total_rss")
    return float(found[1]) / (1 << 20)


def _describe(first: Sample, last: Sample) -> str:
    parts = []
    for name, memory in last.memory.items():
        text = f"{name} {memory:.1f} MiB ({memory - first.memory[name]:+.1f})"
        if name in last.descriptors:
            more = last.descriptors[name] - first.descriptors[name]
            text += f" {last.descriptors[name]} fds ({more:+d})"
        parts.append(text)
    return ", ".join(parts)


def _check_left(node: Crictl, report: Report, what: str) -> None:
    left = node.clean()
    report.check(not left, f"left behind by {what}: {left}")


def _counted(numbers: Iterable[int], what: str, count: int) -> Iterator[int]:
    """Says now and then how far it is, and how long it will take."""
    begin = said = time.monotonic()
    for done, number in enumerate(numbers):
        now = time.monotonic()
        if done and now - said > 10:
            left = (now - begin) / done * (count - done)
            _say(f"{what} {done} of {count}, {left:.0f} s to go")
            said = now
        yield number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
