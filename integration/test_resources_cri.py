# SPDX-License-Identifier: Apache-2.0
"""UpdateContainerResources, which ctr does not offer."""

from __future__ import annotations

import os

import pytest

from integration.lib.cri import CriNode
from integration.lib.kata import wait_until


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the host has one CPU")
def test_an_update_makes_the_vm_larger(node: CriNode) -> None:
    pod = node.run_pod()
    container = node.start_container(pod, "sleep", "1000")

    def memory_mib() -> int:
        return int(node.execute(container, "grep", "MemTotal", "/proc/meminfo").split()[1]) >> 10

    before = memory_mib()
    assert node.execute(container, "nproc").strip() == "1"
    node.crictl(
        *("update", "--cpu-quota", "100000", "--cpu-period", "100000"),
        *("--memory", str(256 << 20), container),
    )
    assert node.execute(container, "nproc").strip() == "2"
    wait_until(lambda: memory_mib() >= before + 240, 10, "the memory is up")
    assert memory_mib() <= before + 272
