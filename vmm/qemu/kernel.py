# SPDX-License-Identifier: Apache-2.0
"""Guest kernels QEMU can boot directly, and what we say to them."""

from __future__ import annotations

import enum
import struct
from pathlib import Path
from typing import BinaryIO

from vmm.errors import VmmConfigError
from vmm.hypervisor import VmConfig

BASE_PARAMETERS = (
    "tsc=reliable",
    "no_timer_check",
    "rcupdate.rcu_expedited=1",
    "noreplace-smp",
    "reboot=t",  # the machine has no keyboard controller to ask
    "cryptomgr.notests",
    "net.ifnames=0",
    "pci=lastbus=0",
    "console=hvc0",
    "panic=1",
    "swiotlb=noforce",  # else memory hot-plug costs the guest 64 MiB of bounce buffers
)

_BZIMAGE_MAGIC_OFFSET = 0x202  # Documentation/arch/x86/boot.rst: "HdrS"
_PVH_NOTE = 18  # XEN_ELFNOTE_PHYS32_ENTRY, include/xen/interface/elfnote.h
_MAX_NOTES = 1 << 16


class KernelFormat(enum.Enum):
    PVH = "pvh"
    BZIMAGE = "bzimage"


def detect_format(path: Path) -> KernelFormat:
    """Look into the file.

    Raises:
        VmmConfigError: it cannot be read, or is neither an ELF with a PVH note nor a bzImage.
    """
    try:
        with path.open("rb") as file:
            head = file.read(0x206)
            if head.startswith(b"\x7fELF"):
                if _has_pvh_note(file, head):
                    return KernelFormat.PVH
                raise VmmConfigError(
                    f"kernel {path} is an ELF file without a PVH entry (CONFIG_PVH)"
                )
    except OSError as error:
        raise VmmConfigError(f"kernel {path}: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise VmmConfigError(f"kernel {path} is a damaged ELF file") from error
    if head[_BZIMAGE_MAGIC_OFFSET : _BZIMAGE_MAGIC_OFFSET + 4] == b"HdrS":
        return KernelFormat.BZIMAGE
    raise VmmConfigError(f"kernel {path} is neither a PVH vmlinux nor a bzImage")


def command_line(config: VmConfig) -> str:
    """The whole kernel command line; the caller's own parameters come last and win."""
    parameters = list(BASE_PARAMETERS)
    parameters.append("debug" if config.debug else "quiet")
    parameters.append(f"nr_cpus={max(config.vcpus, config.max_vcpus)}")
    if config.image is not None:
        parameters += ["root=/dev/vda1", "ro", f"rootfstype={config.rootfs_type}"]
    if config.kernel_params:
        parameters.append(config.kernel_params)
    return " ".join(parameters)


def _has_pvh_note(stream: BinaryIO, head: bytes) -> bool:
    """Walk the PT_NOTE segments of a 64-bit little-endian ELF (System V ABI, chapter 5)."""
    if head[4:6] != b"\x02\x01":
        return False
    table_offset = struct.unpack_from("<Q", head, 32)[0]
    entry_size, entries = struct.unpack_from("<HH", head, 54)
    stream.seek(table_offset)
    table = stream.read(entry_size * entries)
    for index in range(entries):
        kind, _flags, offset, _va, _pa, size = struct.unpack_from(
            "<IIQQQQ", table, index * entry_size
        )
        if kind != 4:  # PT_NOTE
            continue
        stream.seek(offset)
        if _note_present(stream.read(min(size, _MAX_NOTES))):
            return True
    return False


def _note_present(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if name == b"Xen\0" and kind == _PVH_NOTE:
            return True
        position += 12 + (name_size + 3 & ~3) + (value_size + 3 & ~3)
    return False
