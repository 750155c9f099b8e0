# SPDX-License-Identifier: Apache-2.0
"""The yardsticks: a bare boot of the same kernel and image to PID 1, and the shim's `start`."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import trio

from integration.bench.figures import Figure
from vmm.hypervisor import VmConfig
from vmm.qemu.driver import Qemu


def measure(prefix: Path, runs: int) -> list[Figure]:
    """Both yardsticks."""
    bare = Figure("bare boot to PID 1", "kata", "s")
    assets = prefix / "share/kata-containers"
    kernel, image = assets / "vmlinux.container", assets / "kata-containers.img"
    bare.measure(runs, lambda: trio.run(bare_boot, kernel, image))
    start = Figure("shim start returns", "kata", "ms", "≤ 70")
    start.measure(runs, lambda: _start(prefix) * 1000)
    return [bare, start]


async def bare_boot(kernel: Path, image: Path | None, initrd: Path | None = None) -> float:
    """PID 1 is a program that ends at once: the kernel panics, and the VMM ends with it."""
    first = "init" if image is not None else "rdinit"
    with tempfile.TemporaryDirectory(prefix="pykata-") as directory:
        config = VmConfig(
            id="bench",
            state_dir=Path(directory, "vm"),
            binary=Path("/usr/bin/qemu-system-x86_64"),
            kernel=kernel,
            image=image,
            initrd=initrd,
            kernel_params=f"{first}=/bin/true panic=-1",
        )
        begin = time.monotonic()
        async with Qemu(config) as vm:
            await vm.prepare()
            await vm.start()
            await vm.wait()
        return time.monotonic() - begin


def _start(prefix: Path) -> float:
    """`start` in a bundle that names no VM to launch yet, then `delete`."""
    shim = prefix / "bin/containerd-shim-kata-v2"
    with tempfile.TemporaryDirectory(prefix="pykata-") as bundle:
        flags = ["-namespace", "bench", "-id", "bench-start", "-address", f"{bundle}/c.sock"]
        environment = {**os.environ, "TTRPC_ADDRESS": ""}
        begin = time.monotonic()
        subprocess.run(
            [shim, *flags, "start"],
            cwd=bundle,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        seconds = time.monotonic() - begin
        subprocess.run(
            [shim, *flags, "-bundle", bundle, "delete"],
            cwd=bundle,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
        return seconds
