# SPDX-License-Identifier: Apache-2.0
"""``[factory]`` (also ``[hypervisor.NAME.factory]``): virtual machines made ahead of time."""

from __future__ import annotations

from .keys import Section, key


class FactoryConfig(Section):
    """Templates and the VM cache."""

    enable_template: bool = key(False, "start VMs from a saved one", sample=True)
    template_path: str = key("/run/vc/template", "where the saved VMs lie", sample=True)
    template_autocreate: bool = key(
        True, "a sandbox that finds no template has one made for the next", own=True, sample=True
    )
    vm_cache_number: int = key(
        0, "VMs that kata-vm-cache keeps ready", low=0, high=1024, sample=True
    )
    vm_cache_endpoint: str = key(
        "/var/run/kata-containers/cache.sock", "socket of kata-vm-cache", sample=True
    )
    ready_shims: bool = key(
        True,
        "kata-vm-cache also keeps a process that shims are forked from, with all they import",
        own=True,
        sample=True,
    )
