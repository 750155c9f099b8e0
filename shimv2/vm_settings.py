# SPDX-License-Identifier: Apache-2.0
"""From the configuration to what the VMM driver wants."""

from __future__ import annotations

import os
from pathlib import Path

from shimv2.config import Config
from shimv2.network.pod_network import NetworkSettings
from shimv2.state import vm_dir
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
) -> VmConfig:
    """The size and files of the VM, before any container asked for more.

    Args:
        clonable: it becomes a template, or is cloned from one.
        kept: it comes from the VM cache, or waits there.
    """
    hypervisor = config.hypervisor
    host_cpus = os.cpu_count() or 1
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    vcpus = _vcpus(config)
    maximum = hypervisor.default_maxvcpus or host_cpus
    memory = hypervisor.default_memory
    most = hypervisor.default_maxmemory or host_memory
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
        vcpus=vcpus,
        max_vcpus=max(vcpus, min(maximum, host_cpus, _MAX_VCPUS)),
        memory_mib=memory,
        max_memory_mib=max(memory, min(most, host_memory)),
        memory_slots=hypervisor.memory_slots,
        shared_memory=True,
        hugepages=hypervisor.enable_hugepages,
        mem_prealloc=hypervisor.enable_mem_prealloc,
        accelerator=Accelerator(hypervisor.accelerator),
        generation_id=clonable,
        kept=kept,
        seccomp=hypervisor.seccompsandbox,
        debug=hypervisor.enable_debug,
        placement=placement,
    )


def network_settings(config: Config) -> NetworkSettings:
    """How the pod's interfaces reach the VM."""
    hypervisor = config.hypervisor
    return NetworkSettings(
        model=config.runtime.internetworking_model,
        queues=max(hypervisor.network_queues, _vcpus(config)),
        vhost=not hypervisor.disable_vhost_net,
        inbound=hypervisor.rx_rate_limiter_max_rate,
        outbound=hypervisor.tx_rate_limiter_max_rate,
    )


def _vcpus(config: Config) -> int:
    """At the boot: a fraction counts whole, and no more than the host has."""
    host_cpus = os.cpu_count() or 1
    wanted = config.hypervisor.default_vcpus
    return host_cpus if wanted < 0 else min(max(1, -int(-wanted // 1)), host_cpus)


def _kernel_params(config: Config) -> str:
    agent = config.agent
    # The kernel's dummy0 would have the same MAC address in all clones of a template.
    words = ["agent.passfd_listener_port=1027", "agent.forward_port=1028", "dummy.numdummies=0"]
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
