# SPDX-License-Identifier: Apache-2.0
"""What a saved VM of QEMU depends on, as one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmm import identity
from vmm.hypervisor import Accelerator, VmConfig
from vmm.qemu import command_line, firmware


def fingerprint(
    config: VmConfig,
    accelerator: Accelerator,
    devices: Iterable[dict[str, Any]],
    root_ports: int,
    extra: str,
) -> str:
    """64 hex digits; see `Hypervisor.fingerprint`.

    Args:
        devices: those of the boot, as QEMU is told of them.
    """
    bios = firmware.choose(config)
    boot = command_line.Boot(
        config=replace(config, id="", state_dir=Path("/"), debug=False),
        accelerator=accelerator,
        devices=(),
        root_ports=root_ports,
        qmp_fd=0,
        firmware=bios,
    )
    words = command_line.build(boot)
    words += [json.dumps(device) for device in devices]
    words += [f"vcpus {config.vcpus} of {config.max_vcpus}", extra]
    files = (config.binary, config.kernel, config.image, config.initrd, bios)
    words += [identity.of_file(path) for path in files if path is not None]
    if accelerator is Accelerator.KVM:
        words.append(identity.of_host_cpu())
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
