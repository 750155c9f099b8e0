# SPDX-License-Identifier: Apache-2.0
"""Guest memory: its backing, and the arithmetic of growing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmm.errors import VmmConfigError
from vmm.hypervisor import VmConfig

MEMORY_ID = "memory"
MEMFD_NAME = "guest-memory"

BLOCK_MIB = 128
"""Linux on x86-64 brings memory online in blocks of this size (arch/x86/include/asm/sparsemem.h)."""

_PAGE = 4096
_ZEROS = bytes(_PAGE)
_CHUNK = 1 << 20

MIN_MIB = 64
MAX_MIB = 4 << 20
DIMM_ID_PREFIX = "dimm"


def check(config: VmConfig) -> None:
    """Raises VmmConfigError for sizes no VM can have."""
    if not MIN_MIB <= config.memory_mib <= MAX_MIB:
        raise VmmConfigError(
            f"memory of {config.memory_mib} MiB is not between {MIN_MIB} and {MAX_MIB}"
        )
    if config.max_memory_mib > MAX_MIB:
        raise VmmConfigError(f"maximum memory of {config.max_memory_mib} MiB is absurd")
    if not 0 <= config.memory_slots <= 256:
        raise VmmConfigError(f"memory slots {config.memory_slots} are not between 0 and 256")
    if config.private_memory and (config.shared_memory or config.hugepages):
        raise VmmConfigError("private memory is neither shared nor of huge pages")


def can_grow(config: VmConfig) -> bool:
    if config.virtio_mem:
        return virtio_mem_mib(config) > 0
    return config.memory_slots > 0 and config.max_memory_mib > config.memory_mib


def virtio_mem_mib(config: VmConfig) -> int:
    """How large a virtio-mem device for all that may be added is: whole memory blocks."""
    return max(0, config.max_memory_mib - config.memory_mib) // BLOCK_MIB * BLOCK_MIB


def backend(
    object_id: str,
    mib: int,
    config: VmConfig,
    file_fd: int | None = None,
    *,
    private: bool = False,
) -> dict[str, Any]:
    """The memory backend object; nothing of it has a name in a file system, so a killed VM
    leaves no memory behind.

    Args:
        file_fd: an open memory file to use as it is, by its number in QEMU.  To QEMU it is a
            named file: from version 8 on x-ignore-shared leaves out no others.
        private: what is written does not go into that file.
    """
    size = mib << 20
    arguments: dict[str, Any]
    if file_fd is not None:
        arguments = {
            "qom-type": "memory-backend-file",
            "mem-path": f"/proc/self/fd/{file_fd}",
            "share": not private,
        }
    elif config.hugepages:
        arguments = {
            "qom-type": "memory-backend-memfd",
            "hugetlb": True,
            "share": True,
            "prealloc": True,
        }
    elif config.shared_memory:
        arguments = {"qom-type": "memory-backend-memfd", "share": True}
    else:
        arguments = {"qom-type": "memory-backend-ram"}
    if config.mem_prealloc:
        arguments["prealloc"] = True
    return {"id": object_id, "size": size, **arguments}


def make_file(config: VmConfig) -> int | None:
    """An empty anonymous file for all of the boot memory, or None where QEMU makes its own."""
    if not can_be_saved(config):
        return None
    fd = os.memfd_create(MEMFD_NAME)
    os.ftruncate(fd, config.memory_mib << 20)
    return fd


def can_be_saved(config: VmConfig) -> bool:
    """Whether the memory is a file of ours that a snapshot can take over."""
    return (config.shared_memory or config.private_memory) and not config.hugepages


def growth(current_mib: int, wanted_mib: int) -> int:
    """How many MiB to add: whole blocks, none if there is enough."""
    missing = wanted_mib - current_mib
    return 0 if missing <= 0 else -(-missing // BLOCK_MIB) * BLOCK_MIB


def find_memory_file(pid: int) -> Path | None:
    """The guest's memory among the descriptors of a running QEMU."""
    directory = Path(f"/proc/{pid}/fd")
    for entry in os.listdir(directory):
        try:
            target = os.readlink(directory / entry)
        except OSError:
            continue
        if target.startswith(f"/memfd:{MEMFD_NAME}"):
            return directory / entry
    return None


def save_sparse(source_fd: int, target_fd: int) -> None:
    """Copy a file without its holes and without pages of zeros, so that whatever is cloned from
    it is smaller.  Blocks: call it in a worker thread."""
    os.ftruncate(target_fd, os.fstat(source_fd).st_size)
    for start_of_data, end in _data_ranges(source_fd):
        position = start_of_data
        while position < end:
            data = os.pread(source_fd, min(_CHUNK, end - position), position)
            if not data:
                return
            for start, stop in _not_zero(data):
                os.pwrite(target_fd, data[start:stop], position + start)
            position += len(data)


def _data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Where a file has no hole: (start, end) in bytes."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _not_zero(data: bytes) -> Iterator[tuple[int, int]]:
    """The ranges of whole pages that have something in them."""
    begin = -1
    for offset in range(0, len(data), _PAGE):
        if data[offset : offset + _PAGE] == _ZEROS[: len(data) - offset]:
            if begin >= 0:
                yield begin, offset
            begin = -1
        elif begin < 0:
            begin = offset
    if begin >= 0:
        yield begin, len(data)


def copy_sparse(source_fd: int, target_fd: int) -> None:
    """Copy a file without its holes.  Blocks: call it in a worker thread."""
    os.ftruncate(target_fd, os.fstat(source_fd).st_size)
    for start_of_data, end in _data_ranges(source_fd):
        position = start_of_data
        os.lseek(target_fd, position, os.SEEK_SET)
        while position < end:
            copied = os.sendfile(target_fd, source_fd, position, end - position)
            if copied == 0:
                return
            position += copied
