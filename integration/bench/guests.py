# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.guests``: kernels and ways to pack the guest's root, side by side.

Each guest is built by `rootfs-builder` (from its cache, but for what is new), and all take turns:
a bare boot, a cold start, a start from a template, and what an idle guest needs of its memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio
import yaml

from integration.bench import boot
from integration.bench.containers import Workbench
from integration.bench.figures import Figure
from integration.lib.containerd import DEBIAN, Containerd
from integration.lib.images import busybox_image
from integration.lib.templates import Templates

TREE = Path(__file__).resolve().parent.parent.parent
BUILDER = TREE / "rootfs-builder"


@dataclass(frozen=True)
class Guest:
    """One way to make a guest."""

    name: str
    kernel: str
    format: str = "image"
    compression: str = "none"


GUESTS = (
    Guest("built kernel, erofs", "build"),
    Guest("built kernel, erofs lz4", "build", compression="lz4"),
    Guest("built kernel, erofs lz4hc", "build", compression="lz4hc"),
    Guest("built kernel, initrd", "build", "initrd"),
    Guest("built kernel, initrd zstd", "build", "initrd", "zstd"),
    Guest("Debian's kernel, erofs", "debian"),
    Guest("Debian's kernel, erofs lz4", "debian", compression="lz4"),
)


def main() -> int:
    """Build the guests, measure them in turns, print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.guests", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each figure (default: 5)")
    parser.add_argument("--prefix", type=Path, default=TREE / "build/prefix")
    parser.add_argument("--output", type=Path, default=TREE / "build/bench")
    args = parser.parse_args()
    folder = args.output / "guests"
    figures: dict[str, list[Figure]] = {}
    built = {guest: build(guest, folder / _slug(guest.name)) for guest in GUESTS}
    for guest, assets in built.items():
        _say(f"measuring: {guest.name}")
        figures[guest.name] = measure(guest, assets, args.prefix, args.runs)
    print(table(figures))
    (args.output / "guests.json").write_text(
        json.dumps(
            {name: [f.to_json() for f in found if f.values] for name, found in figures.items()}
        )
    )
    return 0


def build(guest: Guest, output: Path) -> Path:
    """Have the builder make it; returns the folder with its files."""
    _say(f"building: {guest.name}")
    output.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = yaml.safe_load((BUILDER / "guest.yaml").read_text())
    for entry in described["files"]:
        entry["source"] = str(BUILDER / entry["source"])
    described["agent"]["path"] = str(BUILDER / described["agent"]["path"])
    for key in ("fragments", "patches"):
        patterns = described["kernel"][key]
        described["kernel"][key] = [str(BUILDER / pattern) for pattern in patterns]
    key = "compression" if guest.format == "image" else "initrd_compression"
    described["image"][key] = guest.compression
    description = output / "guest.yaml"
    description.write_text(yaml.safe_dump(described))
    words: list[str | Path] = [
        "--config",
        description,
        "--kernel",
        guest.kernel,
        "--format",
        guest.format,
    ]
    subprocess.run(
        [sys.executable, BUILDER / "build.py", *words, "--output", output],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return output


def measure(guest: Guest, assets: Path, prefix: Path, runs: int) -> list[Figure]:
    """Sizes, and times by a containerd of its own."""
    root = assets / f"kata-containers{'.img' if guest.format == 'image' else '-initrd.img'}"
    size = Figure("size", "kata", "MB", values=[root.stat().st_size / 1e6])
    bare = Figure("bare boot", "kata", "s")
    image, initrd = (root, None) if guest.format == "image" else (None, root)
    modules = assets / "modules-initrd.img"
    kernel = assets / "vmlinux"
    if not modules.exists():  # its initrd goes on with the agent, whatever PID 1 is to be
        bare.measure(runs, lambda: trio.run(boot.bare_boot, kernel, image, initrd))
    cold = Figure("cold start", "kata", "s")
    used = Figure("memory used", "kata", "MB")
    clone = Figure("from template", "kata", "s")
    template = Figure("template", "kata", "MB")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="bench-", dir="/run")))
        templates = Templates(prefix, directory)
        _configure(templates, kernel, root, guest, modules)
        stack.callback(templates.command, "destroy")
        for enabled in (False, True):
            templates.set("factory", enable_template=enabled)
            if enabled:
                templates.run("init")
                saved = templates.path.glob("*/memory")
                template.values += [path.stat().st_blocks * 512 / 1e6 for path in saved]
            with Containerd(
                DEBIAN,
                shim_path=[prefix / "bin"],
                environment={"KATA_CONF_FILE": str(templates.file)},
            ) as containerd:
                containerd.import_image(busybox_image())
                bench = Workbench(containerd)
                bench.run("kata", "true")
                figure = clone if enabled else cold
                figure.measure(runs, lambda bench=bench: bench.run("kata", "true"))  # type: ignore[misc]
                kind = "template" if enabled else "cold"
                assert f" kind={kind}" in containerd.log.read_text().rpartition(" started: ")[2]
                if not enabled:
                    with bench.container("kata") as container_id:
                        used.measure(1, lambda: _used(bench, container_id))  # noqa: B023 - called at once
    return [size, bare, cold, clone, template, used]


def _configure(templates: Templates, kernel: Path, root: Path, guest: Guest, modules: Path) -> None:
    """Have sandboxes of this configuration run this guest."""
    text = re.sub(
        r"(?m)^(kernel|image|initrd|modules_initrd) = .*\n", "", templates.file.read_text()
    )
    lines = [f'kernel = "{kernel}"', f'{guest.format} = "{root}"']
    if modules.exists():
        lines.append(f'modules_initrd = "{modules}"')
    text = text.replace("[hypervisor.qemu]\n", "[hypervisor.qemu]\n" + "\n".join(lines) + "\n", 1)
    if guest.format == "initrd":
        text = re.sub(r"(?m)^rootfs_type = .*\n", "", text)
    templates.file.write_text(text)


def _used(bench: Workbench, container_id: str) -> float:
    """MB of the VM's memory that its containers can't have."""
    text = bench.execute(container_id, "cat", "/proc/meminfo")
    available = re.search(r"MemAvailable:\s+(\d+) kB", text)
    assert available is not None
    return 2048 * 1.048576 - int(available[1]) * 1024 / 1e6


def table(figures: dict[str, list[Figure]]) -> str:
    """A row a guest; times as best / median."""
    first = next(iter(figures.values()))
    rows = [["", *(f"{figure.name} [{figure.unit}]" for figure in first)]]
    for name, found in figures.items():
        rows.append([name, *(_cell(figure) for figure in found)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(figure: Figure) -> str:
    if not figure.values:
        return ""
    if figure.unit == "s":
        return f"{figure.best:.2f} / {figure.median:.2f}"
    return f"{figure.median:.1f}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
