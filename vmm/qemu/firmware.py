# SPDX-License-Identifier: Apache-2.0
"""Which firmware QEMU loads."""

from __future__ import annotations

from pathlib import Path

from vmm.hypervisor import VmConfig

QBOOT = "qboot.rom"
SEABIOS = "bios-256k.bin"


def choose(config: VmConfig) -> Path | None:
    """The file to load, or None for QEMU's own choice (SeaBIOS).

    qboot hands over to the kernel in a fraction of SeaBIOS's time, but stops at the ACPI tables
    of a generation id: it has no command to write an address back.
    """
    if config.firmware is not None:
        return config.firmware
    name = SEABIOS if config.generation_id else QBOOT
    for prefix in (config.binary.resolve().parent.parent, Path("/usr")):
        for folder in ("qemu", "seabios"):
            path = prefix / "share" / folder / name
            if path.is_file():
                return path
    return None
