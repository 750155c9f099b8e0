# SPDX-License-Identifier: Apache-2.0
"""Checks across keys, and the values that depend on this host.

`resolve` may be applied to its own result: after the files, and again after annotations.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from . import locate
from .errors import ConfigError
from .hypervisor import MAX_VCPUS, MIN_MEMORY_MIB, HypervisorConfig
from .keys import UNSET
from .model import Config

DEFAULT_MEMORY_MIB = 2048
KERNEL = "vmlinux.container"
IMAGE = "kata-containers.img"
OWN_ROOTFS_TYPE = "erofs"
DIAL_TIMEOUT_S = 45
CREATE_TIMEOUT_S = 60
DEBUG_LEVELS = ("trace", "debug")


def host_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def host_memory_mib() -> int:
    """This host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def resolve(config: Config, prefix: Path | None) -> Config:
    """Fill in what depends on the host, and check what no single key can tell.

    Raises:
        ConfigError: the keys contradict each other or ask for more than there is.
    """
    vm = config.hypervisor
    at = f"{config.source or 'built-in defaults'}: hypervisor.{vm.name}"
    if config.runtime.disable_new_netns and config.runtime.internetworking_model != "none":
        raise ConfigError(
            f"{config.source}: runtime.disable_new_netns = true: "
            'expected together with internetworking_model = "none" only'
        )
    if vm.image and vm.initrd:
        raise ConfigError(f"{at}: image and initrd: expected only one of the two")
    if vm.modules_initrd and vm.initrd:
        raise ConfigError(f"{at}: initrd and modules_initrd: expected only one of the two")
    if vm.hot_plug_vfio != "no-port" and vm.cold_plug_vfio != "no-port":
        raise ConfigError(f"{at}: hot_plug_vfio and cold_plug_vfio: expected only one of the two")
    vm = _sized(vm, at)
    if not vm.image and not vm.initrd:
        vm = replace(vm, image=locate.default_asset(IMAGE, prefix), rootfs_type=OWN_ROOTFS_TYPE)
    if vm.kernel == UNSET:
        vm = replace(vm, kernel=locate.default_asset(KERNEL, prefix))
    if vm.virtio_fs_daemon == UNSET:
        vm = replace(vm, virtio_fs_daemon=locate.default_virtiofsd(prefix))
    agent, runtime = config.agent, config.runtime
    return replace(
        config,
        hypervisor=replace(vm, virtio_fs_queue_size=vm.virtio_fs_queue_size or 1024),
        agent=replace(
            agent,
            dial_timeout=agent.dial_timeout or DIAL_TIMEOUT_S,
            enable_debug=agent.enable_debug or agent.log_level in DEBUG_LEVELS,
        ),
        runtime=replace(
            runtime,
            enable_debug=runtime.enable_debug or runtime.log_level in DEBUG_LEVELS,
            create_container_timeout=runtime.create_container_timeout
            or agent.create_container_timeout
            or CREATE_TIMEOUT_S,
        ),
    )


def _sized(vm: HypervisorConfig, at: str) -> HypervisorConfig:
    cpus = min(host_cpus(), MAX_VCPUS)
    vcpus = vm.default_vcpus or 1.0
    if vcpus < 0 or vcpus > cpus:
        vcpus = float(cpus)
    most = vm.default_maxvcpus
    if most == 0 or most > cpus:
        most = cpus
    have = host_memory_mib()
    memory = vm.default_memory or DEFAULT_MEMORY_MIB
    if memory < MIN_MEMORY_MIB:
        raise ConfigError(f"{at}.default_memory = {memory}: expected at least {MIN_MEMORY_MIB} MiB")
    if memory > have:
        raise ConfigError(
            f"{at}.default_memory = {memory}: expected at most this host's memory, {have} MiB"
        )
    ceiling = vm.default_maxmemory
    if ceiling == 0 or ceiling > have:
        ceiling = have
    for name in ("block_device_logical_sector_size", "block_device_physical_sector_size"):
        size = getattr(vm, name)
        if size and (size < 512 or size & (size - 1)):
            raise ConfigError(f"{at}.{name} = {size}: expected a power of two from 512 to 65536")
    return replace(
        vm,
        default_vcpus=vcpus,
        default_maxvcpus=max(most, math.ceil(vcpus)),
        default_memory=memory,
        default_maxmemory=max(ceiling, memory),
    )
