# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.guests``: kernels and ways to pack the guest's root, side by side.

Each guest is built by `rootfs-builder` (from its cache, but for what is new), and all take turns:
a bare boot, a cold start, a start from a template, and what an idle guest needs of its memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
import yaml

from integration.bench import boot
from integration.bench.containers import Workbench
from integration.bench.figures import Figure
from integration.lib.containerd import DEBIAN, Containerd
from integration.lib.images import busybox_image

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
        json.dumps({name: [f.to_json() for f in found] for name, found in figures.items()})
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
    described["kernel"]["fragments"] = [
        str(BUILDER / pattern) for pattern in described["kernel"]["fragments"]
    ]
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
    first = initrd or (modules if modules.exists() else None)
    bare.measure(runs, lambda: trio.run(boot.bare_boot, kernel, image, first))
    cold = Figure("cold start", "kata", "s")
    used = Figure("memory used", "kata", "MB")
    clone = Figure("from template", "kata", "s")
    template = Figure("template", "kata", "MB")
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="/run"))
    try:
        configuration = _configuration(prefix, directory, kernel, root, guest, modules)
        for enabled in (False, True):
            _choose(directory, templates=enabled)
            if enabled:
                _factory(prefix, configuration, "init")
                saved = directory.glob("t/*/memory")
                template.values += [path.stat().st_blocks * 512 / 1e6 for path in saved]
            with Containerd(
                DEBIAN,
                shim_path=[prefix / "bin"],
                environment={"KATA_CONF_FILE": str(configuration)},
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
    finally:
        if (directory / "configuration.toml").exists():
            _factory(prefix, directory / "configuration.toml", "destroy")
        shutil.rmtree(directory)
    return [size, bare, cold, clone, template, used]


def _configuration(
    prefix: Path, directory: Path, kernel: Path, root: Path, guest: Guest, modules: Path
) -> Path:
    text = (prefix / "share/defaults/kata-containers/configuration.toml").read_text()
    text = re.sub(r"(?m)^(kernel|image|initrd|modules_initrd) = .*\n", "", text)
    lines = [f'kernel = "{kernel}"', f'{guest.format} = "{root}"']
    if modules.exists():
        lines.append(f'modules_initrd = "{modules}"')
    text = text.replace("[hypervisor.qemu]\n", "[hypervisor.qemu]\n" + "\n".join(lines) + "\n", 1)
    if guest.format == "initrd":
        text = re.sub(r"(?m)^rootfs_type = .*\n", "", text)
    configuration = directory / "configuration.toml"
    configuration.write_text(text)
    (directory / "config.d").mkdir()
    return configuration


def _choose(directory: Path, *, templates: bool) -> None:
    (directory / "config.d/bench.toml").write_text(
        f'[factory]\nenable_template = {str(templates).lower()}\ntemplate_path = "{directory}/t"\n'
    )


def _factory(prefix: Path, configuration: Path, word: str) -> None:
    command: list[str | Path] = [
        prefix / "bin/kata-runtime",
        "--config",
        configuration,
        "factory",
        word,
    ]
    subprocess.run(command, check=True, capture_output=True)


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
    if figure.unit == "s":
        return f"{figure.best:.2f} / {figure.median:.2f}"
    return f"{figure.median:.1f}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
