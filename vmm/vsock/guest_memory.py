# SPDX-License-Identifier: Apache-2.0
"""The guest's memory, as the regions that a vhost-user front-end shares with us.

Addresses that come from the guest are guest-physical; the addresses of the rings come from the
front-end and are in its own address space.  Both are looked up here and nowhere else, and
nothing outside a region can be reached.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat

#: More than QEMU's memory slots (32 by default there, 256 at most by ACPI) would need.
MAX_REGIONS = 256


class GuestFault(Exception):
    """An address range that is not (wholly) in the guest's memory."""


class Region:
    """One mapped range; `view` covers exactly `size` bytes from guest-physical `start`."""

    __slots__ = ("_map", "size", "start", "user_start", "view")

    def __init__(self, start: int, size: int, user_start: int, fd: int, offset: int) -> None:
        """Map `size` bytes of `fd` from `offset`.  Does not keep `fd`.

        Raises:
            GuestFault: the file is too small, or the numbers make no sense.
        """
        info = os.fstat(fd)
        end = offset + size
        if not stat.S_ISREG(info.st_mode) or end > info.st_size or not 0 < size <= 1 << 46:
            raise GuestFault(f"memory region of {size} bytes at {offset} is not in its file")
        # Huge pages want the mapping's start on a page of theirs; an ordinary region may
        # start anywhere (the hole below 1 MiB splits guest memory on a PC).
        align = max(mmap.ALLOCATIONGRANULARITY, os.fstatvfs(fd).f_bsize)
        base = offset // align * align
        length = min(-(-end // align) * align, info.st_size) - base
        try:
            self._map = mmap.mmap(fd, length, offset=base)
        except (OSError, ValueError, OverflowError) as error:
            raise GuestFault(f"memory region of {size} bytes at {offset}: {error}") from error
        self.start = start
        self.size = size
        self.user_start = user_start
        whole = memoryview(self._map)
        self.view = whole[offset - base : offset - base + size]
        whole.release()

    def forget_pages(self) -> None:
        """Drop the page-table entries; the memory itself is the guest's and stays."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.view.release()
        # A view that an exception's traceback still holds keeps the mapping until it goes.
        with contextlib.suppress(BufferError):
            self._map.close()


class GuestMemory:
    """The table of regions.  Owns the mappings."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._last: Region | None = None

    def __len__(self) -> int:
        return len(self._regions)

    def add(self, start: int, size: int, user_start: int, fd: int, offset: int) -> None:
        """Map a region; the caller keeps and closes `fd`.

        Raises:
            GuestFault: too many regions, an overlap, or a range not in the file.
        """
        if len(self._regions) >= MAX_REGIONS:
            raise GuestFault(f"more than {MAX_REGIONS} memory regions")
        if start + size > 1 << 64 or user_start + size > 1 << 64:
            raise GuestFault("memory region wraps around")
        for other in self._regions:
            if start < other.start + other.size and other.start < start + size:
                raise GuestFault(f"memory region at {start:#x} overlaps that at {other.start:#x}")
        self._regions.append(Region(start, size, user_start, fd, offset))

    def remove(self, start: int, size: int, user_start: int) -> None:
        """Unmap the region with exactly these numbers.  No view of it may be held.

        Raises:
            GuestFault: there is no such region.
        """
        for region in self._regions:
            if (region.start, region.size, region.user_start) == (start, size, user_start):
                self._regions.remove(region)
                self._last = None
                region.close()
                return
        raise GuestFault(f"no memory region of {size} bytes at {start:#x}")

    def clear(self) -> None:
        """Unmap all.  No view may be held."""
        self._last = None
        while self._regions:
            self._regions.pop().close()

    def forget_pages(self) -> None:
        """Give back what the mappings cost this process; see `Region.forget_pages`."""
        for region in self._regions:
            region.forget_pages()

    def view(self, address: int, length: int) -> memoryview:
        """The bytes at a guest-physical range that lies in one region.

        Raises:
            GuestFault: it doesn't.
        """
        region = self._last
        if region is not None:
            offset = address - region.start
            if offset >= 0 and offset + length <= region.size:
                return region.view[offset : offset + length]
        for region in self._regions:
            offset = address - region.start
            if offset >= 0 and offset + length <= region.size:
                self._last = region
                return region.view[offset : offset + length]
        raise GuestFault(f"{length} bytes at {address:#x} are not guest memory")

    def views(self, address: int, length: int) -> list[memoryview]:
        """As `view`, for a range that may go on from one region into the next."""
        found: list[memoryview] = []
        while length:
            for region in self._regions:
                offset = address - region.start
                if 0 <= offset < region.size:
                    part = min(length, region.size - offset)
                    found.append(region.view[offset : offset + part])
                    address += part
                    length -= part
                    break
            else:
                raise GuestFault(f"{length} bytes at {address:#x} are not guest memory")
        return found

    def user_view(self, address: int, length: int) -> memoryview:
        """The bytes at an address of the front-end's, in one region.

        Raises:
            GuestFault: they aren't.
        """
        for region in self._regions:
            offset = address - region.user_start
            if offset >= 0 and offset + length <= region.size:
                return region.view[offset : offset + length]
        raise GuestFault(f"ring of {length} bytes at {address:#x} is not shared with us")
