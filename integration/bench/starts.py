# SPDX-License-Identifier: Apache-2.0
"""How fast a container starts in a clone of a template, and in a VM from the cache.

The clones with a shim of their own and with one that is kept ready; the VM cache with the latter,
which it keeps.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from integration.bench.containers import Workbench
from integration.bench.figures import Figure
from integration.lib.containerd import Containerd, Edition
from integration.lib.images import busybox_image
from integration.lib.kata import wait_until
from integration.lib.templates import Templates
from vmm.template import handover

_READY_WITHIN = 120
_READY_SHIMS = Path("/run/vc/ready-shims")
_GOALS = {"template": "≤ 0.65", "template, ready shim": "≤ 0.65", "cache": "≤ 0.45"}


def measure(edition: Edition, prefix: Path, directory: Path, runs: int) -> list[Figure]:
    """`ctr run --rm true` and exec by both ways; nothing else runs meanwhile.

    Args:
        directory: for templates, sockets and the configuration; short, and there.
    """
    templates = Templates(prefix, directory)
    endpoint = directory / "cache.sock"
    templates.set("agent.kata", debug_console_enabled=False)
    templates.set("factory", vm_cache_number=0, vm_cache_endpoint=str(endpoint))
    templates.run("init")
    figures = []
    try:
        with Containerd(
            edition,
            shim_path=[prefix / "bin"],
            environment={"KATA_CONF_FILE": str(templates.file)},
        ) as containerd:
            containerd.import_image(busybox_image())
            bench = Workbench(containerd)
            figures += _runs(bench, "template", runs, lambda: None)
            with vm_cache(prefix, templates.file):
                figures += _runs(bench, "template, ready shim", runs, lambda: None)
            templates.set("factory", vm_cache_number=1, vm_cache_endpoint=str(endpoint))
            with vm_cache(prefix, templates.file):
                figures += _runs(bench, "cache", runs, lambda: wait_full(endpoint, 1))
    finally:
        templates.run("destroy")
    return figures


def _runs(bench: Workbench, kind: str, runs: int, before: Callable[[], object]) -> list[Figure]:
    whole = Figure(f"ctr run --rm true, {kind}", "kata", "s", _GOALS[kind])
    phases: dict[str, Figure] = {}
    before()
    bench.run("kata", "true")
    for _ in range(runs):
        before()
        whole.values.append(bench.run("kata", "true"))
        assert (
            f" kind={kind.partition(',')[0]}"
            in bench.containerd.log.read_text().rpartition(" started: ")[2]
        )
        for name, seconds in bench.phases().items():
            row = f"  {kind}: {name}"
            phases.setdefault(row, Figure(row, "kata", "s")).values.append(seconds)
    before()
    execute = Figure(f"exec of true, {kind}", "kata", "s", "≤ 0.12")
    with bench.container("kata") as container_id:
        before()  # the next VM is not being made while this one is measured
        bench.exec_seconds(container_id)
        execute.measure(2 * runs, lambda: bench.exec_seconds(container_id))
    return [whole, *phases.values(), execute]


@contextmanager
def vm_cache(prefix: Path, configuration: Path, launcher: Sequence[str] = ()) -> Iterator[None]:
    """A cache service of this configuration, whose shims are ready.

    Args:
        launcher: what containerd is run by; both have to be in the same namespaces.
    """
    command = [*launcher, str(prefix / "bin/kata-vm-cache"), "--config", str(configuration)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stderr=said)
        try:
            wait_until(
                lambda: bool(list(_READY_SHIMS.glob("*/sock"))), _READY_WITHIN, "ready shims"
            )
            yield
        finally:
            process.terminate()
            process.wait(30)
        said.seek(0)
        if "no ready shim" in (text := said.read()):
            raise RuntimeError(f"a shim was forked that should have been ready: {text}")


def wait_full(endpoint: Path, number: int) -> None:
    """Until so many VMs wait in the cache that serves there."""

    def full() -> bool:
        # Asked in this process: the command costs more than the making of a VM that waits for it.
        try:
            told = trio.run(handover.status, str(endpoint))
        except handover.HandoverError:
            return False
        return len(told["machines"]) == number

    wait_until(full, _READY_WITHIN, "the cache is full")
