# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmm.vsock.guest_memory import MAX_REGIONS, GuestFault, GuestMemory

PAGE = 4096


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.truncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.clear()
    assert len(memory) == 0


def test_views_are_the_file(memory: GuestMemory, fd: int) -> None:
    memory.add(0x10000, 4 * PAGE, 0x7000, fd, 2 * PAGE)
    os.pwrite(fd, b"guest", 2 * PAGE + 10)
    assert bytes(memory.view(0x1000A, 5)) == b"guest"
    assert bytes(memory.user_view(0x700A, 5)) == b"guest"
    memory.view(0x10000, 4)[:] = b"host"
    assert os.pread(fd, 4, 2 * PAGE) == b"host"
    memory.forget_pages()
    assert bytes(memory.view(0x10000, 4)) == b"host"


def test_an_offset_that_is_no_multiple_of_a_page(memory: GuestMemory, fd: int) -> None:
    os.pwrite(fd, b"x", 640)
    memory.add(0, PAGE, 0, fd, 640)
    assert bytes(memory.view(0, 1)) == b"x"
    with pytest.raises(GuestFault):
        memory.view(PAGE, 1)


@pytest.mark.parametrize("address", [0xFFFF, 0x10000 + 4 * PAGE, 0, (1 << 64) - 1])
def test_outside(memory: GuestMemory, fd: int, address: int) -> None:
    memory.add(0x10000, 4 * PAGE, 0x7000, fd, 0)
    for find in (memory.view, memory.views):
        with pytest.raises(GuestFault):
            find(address, 2)
    with pytest.raises(GuestFault):
        memory.view(0x10000, 4 * PAGE + 1)
    with pytest.raises(GuestFault):
        memory.user_view(0x6FFF, 2)


@pytest.mark.parametrize(
    ("size", "offset"),
    [(17 * PAGE, 0), (PAGE, 16 * PAGE), (0, 0), (PAGE, 1 << 63), ((1 << 64) - 1, 0)],
)
def test_region_not_in_its_file(memory: GuestMemory, fd: int, size: int, offset: int) -> None:
    with pytest.raises(GuestFault):
        memory.add(0, size, 0, fd, offset)
    assert len(memory) == 0


def test_what_is_no_file(memory: GuestMemory) -> None:
    read, write = os.pipe()
    with pytest.raises(GuestFault):
        memory.add(0, PAGE, 0, read, 0)
    os.close(read)
    os.close(write)


def test_overlap(memory: GuestMemory, fd: int) -> None:
    memory.add(0, 2 * PAGE, 0, fd, 0)
    with pytest.raises(GuestFault, match="overlaps"):
        memory.add(PAGE, PAGE, 0, fd, 0)
    memory.add(2 * PAGE, PAGE, 0, fd, 0)


def test_remove(memory: GuestMemory, fd: int) -> None:
    memory.add(0, PAGE, 0x5000, fd, 0)
    with pytest.raises(GuestFault):
        memory.remove(0, PAGE, 0x6000)
    memory.view(0, 1)
    memory.remove(0, PAGE, 0x5000)
    with pytest.raises(GuestFault):
        memory.view(0, 1)


def test_number_of_regions_is_bounded(memory: GuestMemory, fd: int) -> None:
    for index in range(MAX_REGIONS):
        memory.add(index * PAGE, PAGE, 0, fd, 0)
    with pytest.raises(GuestFault, match="more than"):
        memory.add(MAX_REGIONS * PAGE, PAGE, 0, fd, 0)
