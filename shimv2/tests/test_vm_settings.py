# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the VM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shimv2.config import load_config
from shimv2.vm_settings import vm_config
from vmm.hypervisor import Placement


@pytest.mark.parametrize(
    ("changes", "clonable", "shared", "private"),
    [
        ({}, True, True, False),
        ({"shared_fs": "none", "vsock": "vhost-user"}, True, True, False),
        ({"shared_fs": "none", "vsock": "vhost"}, False, False, False),
        ({"shared_fs": "none", "vsock": "vhost"}, True, False, True),
        (
            {"shared_fs": "none", "vsock": "vhost", "reclaim_guest_freed_memory": True},
            *(True, True, False),
        ),
    ],
)
def test_memory_is_shared_only_where_a_device_needs_it(
    tmp_path: Path, changes: dict[str, Any], clonable: bool, shared: bool, private: bool
) -> None:
    (tmp_path / "c.toml").write_text("[hypervisor.qemu]\nkernel = '/k'\nimage = '/i'\n")
    config = load_config(tmp_path / "c.toml")
    config = replace(config, hypervisor=replace(config.hypervisor, **changes))
    vm = vm_config(config, "s", Placement(), clonable=clonable)
    assert (vm.shared_memory, vm.private_memory) == (shared, private)
