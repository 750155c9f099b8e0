# SPDX-License-Identifier: Apache-2.0
"""Swap space of the guest: files of the host as disks, as many as the containers ask for.

A file has no name, so nothing is left of it once QEMU has closed it.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from agent.api import agent_pb2
from vmm.errors import CapacityError
from vmm.hypervisor import BlockDevice

if TYPE_CHECKING:
    from shimv2.guest import Guest

log = logging.getLogger("sandbox")

_PAGE = 4096
_LEAST_PAGES = 10  # Linux takes no swap space with fewer
_MAGIC = b"SWAPSPACE2"


def swap_header(pages: int) -> bytes:
    """First page of a swap space of so many pages, itself included (linux/swap.h: union
    swap_header)."""
    info = struct.pack("<III", 1, pages - 1, 0) + os.urandom(16)  # version, last page, no bad ones
    header = bytes(1024) + info
    return header + bytes(_PAGE - len(header) - len(_MAGIC)) + _MAGIC


class GuestSwap:
    """Of one VM.

    Args:
        directory: where the files lie; it is made if it is not there.
    """

    def __init__(self, directory: Path, guest: Guest) -> None:
        self._directory = directory
        self._guest = guest
        self._size = 0
        self._disks = 0

    async def cover(self, size: int) -> None:
        """Bring it to at least `size` bytes; it never gets less.

        Raises:
            CapacityError: there can be no file of that size.
            VmmError, RpcError: the VM or its guest don't take it.
        """
        more = size - self._size
        if more <= 0:
            return
        fd = self._make_file(max(_LEAST_PAGES, -(-more // _PAGE)) + 1)
        try:
            path = Path(f"/proc/{os.getpid()}/fd/{fd}")
            disk = BlockDevice(id=f"swap{self._disks}", path=path)
            place = await self._guest.add_device(disk)
        finally:
            os.close(fd)
        self._disks += 1
        slots = [int(slot, 16) for slot in place.pci_path.split("/")]
        await self._guest.call("AddSwap", agent_pb2.AddSwapRequest(PCIPath=slots))
        self._size = size
        log.info("the guest has %d MiB of swap", size >> 20)

    def _make_file(self, pages: int) -> int:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _open_unnamed(self._directory)
            try:
                os.ftruncate(fd, pages * _PAGE)
                os.pwrite(fd, swap_header(pages), 0)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise CapacityError(
                f"swap of {pages * _PAGE} bytes in guest_swap_path = '{self._directory}':"
                f" {error.strerror}"
            ) from error
        return fd


def _open_unnamed(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    fd, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    return fd
