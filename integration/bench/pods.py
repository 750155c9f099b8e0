# SPDX-License-Identifier: Apache-2.0
"""How fast a pod with a network is ready, and a further container in it; by CRI.

From a template, with a shim of its own and with one that was ready, and in a VM from the cache
with the latter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from integration.bench.figures import Figure
from integration.bench.starts import vm_cache, wait_full
from integration.lib.containerd import Edition
from integration.lib.cri import NAMESPACE, CriNode
from integration.lib.images import Image, busybox_layer, oci_archive
from integration.lib.templates import Templates

_PAUSE = "localhost/pause:bench"


def measure(edition: Edition, prefix: Path, directory: Path, runs: int) -> list[Figure]:
    """Of both runtimes in turns; `crictl` itself is part of each.

    Args:
        directory: for templates and their configuration; short, and there.
    """
    templates = Templates(prefix, directory)
    endpoint = directory / "cache.sock"
    templates.set("factory", vm_cache_number=1, vm_cache_endpoint=str(endpoint))
    templates.run("init")
    calls = Figure("a call of crictl (version)", "kata", "s")
    with ExitStack() as stack:
        stack.callback(templates.command, "destroy")
        node = stack.enter_context(
            CriNode(edition, prefix, configuration=templates.file, sandbox_image=_PAUSE)
        )
        # With runc the pause container is one, and has to stay.
        pause = Image([busybox_layer()], command=["/bin/sleep", "infinity"])
        archive = oci_archive(directory / "pause.tar", _PAUSE, pause)
        node.containerd.import_image(archive, namespace=NAMESPACE)
        calls.measure(runs, lambda: _seconds(node.crictl, "version"))
        figures = _runs(node, "template", ("runc", "kata"), runs, lambda: None)
        templates.set("factory", vm_cache_number=0, vm_cache_endpoint=str(endpoint))
        with vm_cache(prefix, templates.file, node.host.launcher):  # the node's own copy asks for 1
            figures += _runs(node, "template, ready shim", ("kata",), runs, lambda: None)
        templates.set("factory", vm_cache_number=1, vm_cache_endpoint=str(endpoint))
        with vm_cache(prefix, templates.file, node.host.launcher):
            figures += _runs(node, "cache", ("kata",), runs, lambda: wait_full(endpoint, 1))
    return [calls, *figures]


def _runs(
    node: CriNode, kind: str, handlers: Sequence[str], runs: int, before: Callable[[], object]
) -> list[Figure]:
    goals = {
        f"pod, network and two containers ({kind})": "≤ 1.2 from a template",
        f"a further container ({kind})": "≤ 0.26 from a template",
        f"stop and remove the pod ({kind})": "",
    }
    figures = {h: [Figure(name, h, "s", goal) for name, goal in goals.items()] for h in handlers}
    so_far = len(node.containerd.log.read_text())
    for number in range(runs + 1):  # the first one fills caches
        for handler in handlers:
            before()
            for figure, seconds in zip(figures[handler], _one(node, handler), strict=True):
                if number:
                    figure.values.append(seconds)
    log = node.containerd.log.read_text()[so_far:]
    assert log.count(f"kind={kind.partition(',')[0]}") >= 3 * runs, f"some pods were not of {kind}"
    return [figures[handler][row] for row in range(len(goals)) for handler in handlers]


def _one(node: CriNode, handler: str) -> tuple[float, float, float]:
    began = time.monotonic()
    pod = node.run_pod(handler=handler)
    for _ in range(2):
        node.start_container(pod, "sleep", "1000")
    ready = time.monotonic() - began
    further = _seconds(node.start_container, pod, "sleep", "1000")
    return ready, further, _seconds(node.remove_pod, pod)


def _seconds(call: Any, *words: Any) -> float:
    began = time.monotonic()
    call(*words)
    return time.monotonic() - began
