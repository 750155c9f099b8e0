# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line, as a pure function of the configuration and the devices at boot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmm.errors import VmmConfigError
from vmm.hypervisor import Accelerator, VmConfig
from vmm.qemu import kernel, memory, pci
from vmm.qemu.devices import SERIAL_ID, Parts, pci_device

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""Strictest seccomp policy that still starts: QEMU's helpers are never needed."""

TCG_BUFFER_MIB = 96
"""Translated code kept; when it is full, all of it is thrown away.  A boot, a container and a few
execs fill 70 MiB (`x-query-jit`).  QEMU's own default is an eighth of the host's memory, all of which
a long-lived guest ends up filling."""

SERIAL_PORTS = 4
"""Console and serial devices a VM can have.  Each is two queues that the guest sets up, and QEMU wires
up whenever the guest goes on: with its own default of 31 that takes 10 ms."""

TCG_REGION_MIB = 2
"""The least that a vCPU gets of that buffer, if it is large enough for all (tcg/region.c)."""

# What a guest kernel on virtio has no use for; each costs firmware and kernel time.
MACHINE_OPTIONS = (
    "sata=off",
    "smbus=off",
    "i8042=off",
    "vmport=off",
    "hpet=off",
    "graphics=off",
    "usb=off",
    "dump-guest-core=off",
)

_PORT_CHASSIS_BASE = 16


@dataclass(frozen=True, slots=True)
class Boot:
    """Everything the command line is made from.

    Args:
        devices: in the order they are created.
        root_ports: empty pcie-root-ports for hot-plug.
        qmp_fd: our connected end's peer, in QEMU's numbering.
        memory_fd: memory file of a restored VM.
        incoming: start paused, waiting for a saved state.
    """

    config: VmConfig
    accelerator: Accelerator
    devices: Sequence[Parts]
    root_ports: int
    qmp_fd: int
    firmware: Path | None = None
    memory_fd: int | None = None
    incoming: bool = False


def build(boot: Boot) -> list[str]:
    """The argument vector, program first."""
    config = boot.config
    argv = [str(config.binary)]
    argv += ["-name", f"sandbox-{config.id.replace(',', ',,')},debug-threads=on"]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-nographic", "-vga", "none"]
    argv += ["-sandbox", config.seccomp or SANDBOX]
    argv += ["-machine", _machine(boot), "-accel", _accelerator(boot)]
    argv += ["-cpu", _cpu(boot), "-smp", _smp(boot), "-m", _memory(config)]
    argv += [
        "-object",
        _json(
            memory.backend(
                memory.MEMORY_ID,
                config.memory_mib,
                config,
                boot.memory_fd,
                private=boot.incoming and config.private_memory,
            )
        ),
    ]
    argv += ["-rtc", "base=utc,clock=host"]
    if boot.accelerator is Accelerator.KVM:
        argv += ["-global", "kvm-pit.lost_tick_policy=discard"]
    if boot.firmware is not None:
        argv += ["-bios", str(boot.firmware)]
    argv += ["-chardev", f"socket,id=qmp,fd={boot.qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    parameters = kernel.command_line(config)
    if boots_all_vcpus(boot.accelerator):
        parameters = f"maxcpus={config.vcpus} {parameters}"
    argv += ["-kernel", str(config.kernel), "-append", parameters]
    if config.initrd is not None:
        argv += ["-initrd", str(config.initrd)]
    argv += _fixed_devices(boot)
    for parts in boot.devices:
        argv += _parts(parts)
    if boot.incoming:
        argv += ["-S", "-incoming", "defer"]
    if config.debug:
        argv += ["-qmp", f"unix:path={config.state_dir}/extra-monitor.sock,server=on,wait=off"]
    return argv


def machine_type(config: VmConfig) -> str:
    """``q35`` or one of its versions.

    Raises:
        VmmConfigError: another machine is asked for.
    """
    name = config.machine_type or "q35"
    if name != "q35" and not name.startswith("pc-q35-"):
        raise VmmConfigError(f"machine type {name!r} is not supported, only q35 is")
    return name


def _machine(boot: Boot) -> str:
    options = [machine_type(boot.config), *MACHINE_OPTIONS, f"memory-backend={memory.MEMORY_ID}"]
    if boot.config.machine_accelerators:
        options.append(boot.config.machine_accelerators.strip(","))
    return ",".join(options)


def _accelerator(boot: Boot) -> str:
    if boot.accelerator is Accelerator.KVM:
        return "kvm"
    # Each vCPU holds a region of 2 MiB from the start, also one that never runs.
    idle = max(boot.config.vcpus, boot.config.max_vcpus) - 1
    return f"tcg,thread=multi,tb-size={TCG_BUFFER_MIB + TCG_REGION_MIB * idle}"


def _cpu(boot: Boot) -> str:
    # With ERMS (QEMU 8.1: also FSRM) the kernel copies by `rep movsb`, which TCG does byte by byte.
    model = "host" if boot.accelerator is Accelerator.KVM else "max,-erms,-fsrm"
    features = boot.config.cpu_features.strip(",")
    return f"{model},{features}" if features else model


def boots_all_vcpus(accelerator: Accelerator) -> bool:
    """Whether all vCPUs that there may ever be are there from the start, and the guest is told
    to begin with fewer.

    TCG hands out its buffer in regions, to each vCPU another; a vCPU that is plugged while none
    is free ends QEMU (tcg/region.c asserts that there is one).  Nor does Linux believe in
    pluggable vCPUs there: it counts those of QEMU's MADT only below a hypervisor that it knows
    (arch/x86/kernel/acpi/boot.c).
    """
    return accelerator is Accelerator.TCG


def _smp(boot: Boot) -> str:
    config = boot.config
    most = max(config.vcpus, config.max_vcpus)
    first = most if boots_all_vcpus(boot.accelerator) else config.vcpus
    return f"{first},sockets={most},cores=1,threads=1,maxcpus={most}"


def _memory(config: VmConfig) -> str:
    if not memory.can_grow(config):
        return f"{config.memory_mib}M"
    # A DIMM is aligned to 1 GiB in the address space above what is there at boot.
    most = config.max_memory_mib + 1024
    slots = "" if config.virtio_mem else f"slots={config.memory_slots},"
    return f"{config.memory_mib}M,{slots}maxmem={most}M"


def _fixed_devices(boot: Boot) -> list[str]:
    serial = pci_device("virtio-serial-pci", SERIAL_ID, pci.SERIAL_PLACE, max_ports=SERIAL_PORTS)
    argv = ["-device", _json(_bridge()), "-device", _json(serial)]
    for index in range(boot.root_ports):
        port = {
            "driver": "pcie-root-port",
            "id": pci.port_id(index),
            "bus": pci.ROOT_BUS,
            "addr": f"{pci.PORT_SLOTS[index]:#x}",
            "chassis": _PORT_CHASSIS_BASE + index,
            "slot": index,
        }
        argv += ["-device", _json(port)]
    panic = {
        "driver": "pvpanic-pci",
        "id": "pvpanic0",
        "bus": pci.ROOT_BUS,
        "addr": f"{pci.PANIC_SLOT:#x}",
    }
    argv += ["-device", _json(panic)]
    if boot.config.generation_id:
        argv += ["-device", _json({"driver": "vmgenid", "id": "vmgenid0", "guid": "auto"})]
    return argv


def _bridge() -> dict[str, Any]:
    return {
        "driver": "pci-bridge",
        "id": pci.BRIDGE_ID,
        "bus": pci.ROOT_BUS,
        "addr": f"{pci.BRIDGE_SLOT:#x}",
        "chassis_nr": 1,
        "shpc": False,
        "io-reserve": 4 << 10,
        "mem-reserve": 1 << 20,
        "pref64-reserve": 1 << 20,
    }


def _parts(parts: Parts) -> list[str]:
    argv: list[str] = []
    for item in parts.objects:
        argv += ["-object", _json(item)]
    for node in parts.blockdevs:
        argv += ["-blockdev", _json(node)]
    for chardev in parts.chardevs:
        argv += ["-chardev", chardev.option()]
    for netdev in parts.netdevs:
        argv += ["-netdev", netdev.option()]
    return [*argv, "-device", _json(parts.device)]


def _json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments)
