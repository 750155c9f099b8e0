# SPDX-License-Identifier: Apache-2.0
"""From the configuration to what the VMM driver wants."""

from __future__ import annotations

import math
import os
from pathlib import Path

from shimv2.config import Config
from shimv2.network.pod_network import NetworkSettings
from shimv2.resources import Demand, Size, wanted_size
from shimv2.state import vm_dir
from vmm import vsock
from vmm.hypervisor import Accelerator, Placement, VmConfig

SHARE_TAG = "kataShared"  # facts/guest-layout: the tag Kata's agent looks for

_MAX_VCPUS = 240  # what QEMU's q35 takes on x86 without further devices


def virtiofs_socket(sandbox_id: str) -> Path:
    """Where virtiofsd listens for the VMM."""
    return vm_dir(sandbox_id) / "vhost-fs.sock"


def vm_config(
    config: Config,
    sandbox_id: str,
    placement: Placement,
    *,
    clonable: bool = False,
    kept: bool = False,
    fixed: Size | None = None,
) -> VmConfig:
    """The size and files of the VM, before any container asked for more.

    Args:
        clonable: it becomes a template, or is cloned from one.
        kept: it comes from the VM cache, or waits there.
        fixed: its size for good.
    """
    hypervisor = config.hypervisor
    # virtiofsd and our own vsock map the guest's memory; a balloon can't be in a private clone.
    shared = hypervisor.shared_fs != "none" or vsock.resolve(hypervisor.vsock) == "vhost-user"
    private = clonable and not shared and not hypervisor.reclaim_guest_freed_memory
    size = fixed or own_size(config)
    most = fixed or most_size(config)
    return VmConfig(
        id=sandbox_id,
        state_dir=vm_dir(sandbox_id),
        binary=hypervisor.path,
        kernel=hypervisor.kernel,
        image=hypervisor.image,
        initrd=hypervisor.initrd or hypervisor.modules_initrd,
        rootfs_type=hypervisor.rootfs_type,
        kernel_params=_kernel_params(config),
        machine_type=hypervisor.machine_type,
        machine_accelerators=hypervisor.machine_accelerators,
        cpu_features=hypervisor.cpu_features,
        firmware=hypervisor.firmware,
        vcpus=size.vcpus,
        max_vcpus=most.vcpus,
        memory_mib=size.memory_mib,
        max_memory_mib=most.memory_mib,
        memory_slots=hypervisor.memory_slots,
        virtio_mem=hypervisor.enable_virtio_mem,
        shared_memory=shared or (clonable and not private),
        private_memory=private,
        hugepages=hypervisor.enable_hugepages,
        mem_prealloc=hypervisor.enable_mem_prealloc,
        accelerator=Accelerator(hypervisor.accelerator),
        generation_id=clonable,
        kept=kept,
        seccomp=hypervisor.seccompsandbox,
        debug=hypervisor.enable_debug,
        placement=placement,
    )


def own_size(config: Config) -> Size:
    """What a VM boots with: a fraction of a CPU counts whole, and no more than the host has."""
    host_cpus = os.cpu_count() or 1
    wanted = config.hypervisor.default_vcpus
    vcpus = host_cpus if wanted < 0 else min(max(1, math.ceil(wanted)), host_cpus)
    return Size(vcpus, config.hypervisor.default_memory)


def most_size(config: Config) -> Size:
    """How far a VM can grow here."""
    hypervisor, own = config.hypervisor, own_size(config)
    host_cpus = os.cpu_count() or 1
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    vcpus = min(hypervisor.default_maxvcpus or host_cpus, host_cpus, _MAX_VCPUS)
    memory = min(hypervisor.default_maxmemory or host_memory, host_memory)
    return Size(max(own.vcpus, vcpus), max(own.memory_mib, memory))


def fixed_size(config: Config, workload: Demand) -> Size:
    """Of a VM that has one size for good, by `static_sandbox_resource_mgmt`.

    Raises:
        CapacityError: it can't have so much memory here.
    """
    cpus = config.hypervisor.default_vcpus
    own = own_size(config)
    return wanted_size(
        own.vcpus if cpus < 0 else max(cpus, 0.0), own.memory_mib, [workload], most_size(config)
    )


def network_settings(config: Config, fixed: Size | None = None) -> NetworkSettings:
    """How the pod's interfaces reach the VM; `fixed` as for `vm_config`."""
    hypervisor = config.hypervisor
    return NetworkSettings(
        model=config.runtime.internetworking_model,
        queues=max(hypervisor.network_queues, (fixed or own_size(config)).vcpus),
        vhost=not hypervisor.disable_vhost_net,
        inbound=hypervisor.rx_rate_limiter_max_rate,
        outbound=hypervisor.tx_rate_limiter_max_rate,
    )


def _kernel_params(config: Config) -> str:
    agent = config.agent
    words = [
        "agent.passfd_listener_port=1027",
        "agent.forward_port=1028",
        "agent.hotplug_timeout=10",  # seconds; Kata's 3 are little for an emulated guest
        "dummy.numdummies=0",  # dummy0 would have the same MAC address in all clones of a template
        "scsi_mod.scan=manual",  # the agent looks where a disk is, not at 256 targets
    ]
    if config.hypervisor.enable_virtio_mem:
        # What is added can be taken away again where the kernel keeps nothing of its own.
        words.append("memory_hotplug.online_policy=auto-movable")
    if config.hypervisor.vsock == "serial":
        words.append("agent.server_addr=serial://agent.channel.0")
    if agent.enable_debug:
        words.append("agent.log=debug")
    if agent.debug_console_enabled:
        words += ["agent.debug_console", "agent.debug_console_vport=1026"]
    if agent.container_pipe_size:
        words.append(f"agent.container_pipe_size={agent.container_pipe_size}")
    if config.hypervisor.kernel_params:
        words.append(config.hypervisor.kernel_params)
    return " ".join(words)
