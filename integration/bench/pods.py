# SPDX-License-Identifier: Apache-2.0
"""How fast a pod with a network is ready, and a further container in it; by CRI, from a template."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from integration.bench.figures import Figure
from integration.lib.containerd import Edition
from integration.lib.cri import NAMESPACE, CriNode
from integration.lib.images import Image, busybox_layer, oci_archive
from integration.lib.templates import Templates

_PAUSE = "localhost/pause:bench"
_HANDLERS = {"runc": "runc", "kata": "kata"}


def measure(edition: Edition, prefix: Path, directory: Path, runs: int) -> list[Figure]:
    """Of both runtimes in turns; `crictl` itself is part of each.

    Args:
        directory: for templates and their configuration; short, and there.
    """
    templates = Templates(prefix, directory)
    done = templates.command("init")
    if done.returncode:
        raise RuntimeError(f"no template: {done.stderr}")
    calls = Figure("a call of crictl (version)", "kata", "s")
    ready = _pair("pod, network and two containers", "≤ 1.2 from a template")
    further = _pair("a further container", "≤ 0.26 from a template")
    removed = _pair("stop and remove the pod", "")
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
        for number in range(runs + 1):  # the first one fills caches
            for runtime, handler in _HANDLERS.items():
                figures = [f[runtime] for f in (ready, further, removed)]
                for figure, seconds in zip(figures, _one(node, handler), strict=True):
                    if number:
                        figure.values.append(seconds)
        log = node.containerd.log.read_text()
        assert log.count("kind=template") >= 3 * runs, "some pods were no clones"
    return [calls, *(f[runtime] for f in (ready, further, removed) for runtime in _HANDLERS)]


def _pair(name: str, goal: str) -> dict[str, Figure]:
    return {runtime: Figure(name, runtime, "s", goal) for runtime in _HANDLERS}


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
