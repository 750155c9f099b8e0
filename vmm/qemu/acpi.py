# SPDX-License-Identifier: Apache-2.0
"""A MADT of our own, for vCPU hot-plug under TCG.

Recent Linux counts a disabled processor of QEMU's MADT as hot-pluggable only where it knows
its hypervisor (arch/x86/kernel/acpi/boot.c), and TCG is none that it knows.  So the guest gets
a second table, in which every processor is there, and is told to start only those that are
(``maxcpus``); the others it can bring online once they have been plugged.  QEMU appends the
table with ``-acpitable``; ``acpi_apic_instance=2`` makes the guest read it.
"""

from __future__ import annotations

import struct

# ACPI 6.5, section 5.2.12
_REVISION = 1
_LOCAL_APIC_ADDRESS = 0xFEE00000
_IO_APIC_ADDRESS = 0xFEC00000
_PCAT_COMPAT = 1
_ENABLED = 1
_ACTIVE_HIGH_LEVEL = 0x0D

_PCI_INTERRUPTS = (5, 9, 10, 11)  # level-triggered ISA lines of q35's ICH9


def kernel_parameters(vcpus: int) -> str:
    """What makes the guest use the table and start `vcpus` processors."""
    return f"acpi_apic_instance=2 maxcpus={vcpus}"


def madt(max_vcpus: int) -> bytes:
    """The table for `max_vcpus` processors, one per socket (so APIC ids count up)."""
    entries = [struct.pack("<BBBBI", 0, 8, cpu, cpu, _ENABLED) for cpu in range(max_vcpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, _IO_APIC_ADDRESS, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0))  # the timer comes in on pin 2
    entries += [
        struct.pack("<BBBBIH", 2, 10, 0, line, line, _ACTIVE_HIGH_LEVEL) for line in _PCI_INTERRUPTS
    ]
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI on LINT1 of every processor
    body = struct.pack("<II", _LOCAL_APIC_ADDRESS, _PCAT_COMPAT) + b"".join(entries)
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        b"APIC",
        36 + len(body),
        _REVISION,
        0,
        b"PYKATA",
        b"PYKATACP",
        1,
        b"PYKA",
        1,
    )
    table = bytearray(header + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)
