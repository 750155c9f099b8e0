# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench``: the table of figures, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from integration.bench import boot, containers, memory, pods, starts
from integration.bench.figures import Figure, table
from integration.lib.containerd import DEBIAN, Containerd, Edition
from integration.lib.go_tools import containerd_edition
from integration.lib.images import busybox_image
from integration.lib.templates import without_templates

TREE = Path(__file__).resolve().parent.parent.parent
_PARTS = ("boot", "starts", "pods", "containers", "memory")


def main() -> int:
    """Measure runc and this runtime side by side; runtimes take turns."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of each figure (default: 10)")
    parser.add_argument(
        "--edition", choices=("debian", "go"), default="debian", help="which containerd"
    )
    parser.add_argument("--prefix", type=Path, default=TREE / "build/prefix")
    parser.add_argument("--output", type=Path, default=TREE / "build/bench/figures.json")
    parser.add_argument(
        "--only",
        choices=_PARTS,
        action="append",
        help="a part",
    )
    args = parser.parse_args()
    parts = args.only or _PARTS
    figures: list[Figure] = []

    def step(name: str, work: Callable[[], list[Figure]]) -> None:
        if name in parts:
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            begin = time.monotonic()
            figures.extend(work())
            print(f"  {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)

    step("boot", lambda: boot.measure(args.prefix, args.runs))
    edition = DEBIAN if args.edition == "debian" else containerd_edition()
    for name, measure in (("starts", starts.measure), ("pods", pods.measure)):
        step(name, partial(_with_directory, measure, edition, args.prefix, args.runs))
    configuration = without_templates(args.prefix)
    with Containerd(
        edition,
        shim_path=[args.prefix / "bin"],
        environment={"KATA_CONF_FILE": str(configuration)},
    ) as containerd:
        containerd.import_image(busybox_image())
        bench = containers.Workbench(containerd)
        step("containers", lambda: containers.measure(bench, args.runs))
        step("memory", lambda: memory.measure(bench, max(2, args.runs // 3)))
        version = containerd.ctr("--version").stdout.strip()
    print(f"{version}, Linux {platform.release()}, {os.cpu_count()} CPUs, {args.runs} runs")
    print(table(figures))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([figure.to_json() for figure in figures], indent=1))
    print(f"as JSON: {args.output}")
    return 0


def _with_directory(
    measure: Callable[[Edition, Path, Path, int], list[Figure]],
    edition: Edition,
    prefix: Path,
    runs: int,
) -> list[Figure]:
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="/run"))
    try:
        return measure(edition, prefix, directory, runs)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(main())
