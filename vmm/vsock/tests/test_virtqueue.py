# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.vsock.guest_memory import GuestMemory
from vmm.vsock.tests.guest_model import F_INDIRECT_DESC, F_NEXT, F_WRITE, Queue
from vmm.vsock.virtqueue import QueueError, Virtqueue

SIZE = 1 << 20
ENTRIES = 8
DATA = 0x8000


class Pair:
    """A driver's and a device's view of one ring in 1 MiB of memory at guest address 0."""

    def __init__(self, event_idx: bool = True, base: int = 0) -> None:
        self.fd = os.memfd_create("ring")
        os.truncate(self.fd, SIZE)
        self.bytes = mmap.mmap(self.fd, SIZE)
        self.driver = Queue(self.bytes, 0x1000, ENTRIES, event_idx)
        self.driver.avail_idx = self.driver.kicked = self.driver.last_used = base
        self.memory = GuestMemory()
        self.memory.add(0, SIZE, 0, self.fd, 0)
        table, available, used = Virtqueue.sizes(ENTRIES)
        self.device = Virtqueue(
            self.memory,
            self.memory.view(self.driver.descriptors, table),
            self.memory.view(self.driver.available, available),
            self.memory.view(self.driver.used, used),
            ENTRIES,
            base,
            event_idx,
        )

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.driver.offer(head)
        self.driver.set_u16(self.driver.available + 2, self.driver.avail_idx)

    def close(self) -> None:
        self.device.release()
        self.memory.clear()
        self.driver.close()
        self.bytes.close()
        os.close(self.fd)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_a_chain_goes_there_and_back(pair: Pair) -> None:
    pair.bytes[DATA : DATA + 5] = b"hello"
    pair.driver.describe(3, DATA, 5, F_NEXT, 1)
    pair.driver.describe(1, DATA + 0x100, 10, F_WRITE, 0)
    assert pair.device.pop() is None
    pair.offer(3)
    chain = pair.device.pop()
    assert chain is not None
    head, readable, writable = chain
    assert (head, [bytes(r) for r in readable]) == (3, [b"hello"])
    writable[0][:3] = b"abc"
    pair.device.push(head, 3)
    assert pair.driver.take() == []
    assert pair.device.publish()
    assert pair.driver.take() == [(3, 3)]
    assert pair.bytes[DATA + 0x100 : DATA + 0x103] == b"abc"
    assert pair.device.pop() is None


@pytest.mark.parametrize("event_idx", [True, False])
def test_indices_wrap(event_idx: bool) -> None:
    pair = Pair(event_idx, base=0xFFFD)
    for i in range(ENTRIES):
        pair.driver.describe(i, DATA, 1, 0, 0)
    for round_ in range(3):
        pair.offer(*range(ENTRIES))
        heads = []
        while (chain := pair.device.pop()) is not None:
            heads.append(chain[0])
            pair.device.push(chain[0], round_)
        assert heads == list(range(ENTRIES))
        pair.device.publish()
        assert pair.driver.take() == [(i, round_) for i in range(ENTRIES)]
        assert not pair.driver.want_call()
    pair.close()


def test_unpop_offers_a_chain_again(pair: Pair) -> None:
    pair.driver.describe(0, DATA, 1, 0, 0)
    pair.driver.describe(1, DATA, 1, 0, 0)
    pair.offer(0, 1)
    assert [pair.device.pop()[0], pair.device.pop()[0]] == [0, 1]  # type: ignore[index]
    pair.device.unpop(2)
    assert pair.device.pop()[0] == 0  # type: ignore[index]


def test_kicks_and_calls_with_event_indices(pair: Pair) -> None:
    pair.driver.describe(0, DATA, 1, 0, 0)
    assert not pair.device.enable_kick()
    pair.driver.offer(0)
    pair.driver.kick()
    assert os.eventfd_read(pair.driver.kick_fd) == 1
    assert pair.device.enable_kick()  # one is there: look again instead of sleeping
    assert pair.device.pop() is not None
    pair.driver.offer(0)
    pair.driver.kick()  # nobody asked for this one: the device asked for index 1 only later
    pair.device.push(0, 0)
    assert pair.device.publish()
    pair.device.pop()
    pair.device.push(0, 0)
    assert not pair.device.publish()  # the driver has not asked for a call at index 2


def test_flags_without_event_indices() -> None:
    pair = Pair(event_idx=False)
    pair.driver.describe(0, DATA, 1, 0, 0)
    pair.device.disable_kick()
    pair.driver.offer(0)
    pair.driver.kick()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(pair.driver.kick_fd)
    assert pair.device.enable_kick()
    pair.device.pop()
    pair.device.push(0, 0)
    pair.driver.set_u16(pair.driver.available, 1)
    assert not pair.device.publish()
    pair.close()


def test_indirect_table(pair: Pair) -> None:
    struct.pack_into("<QIHH", pair.bytes, 0x4000, DATA, 2, F_NEXT, 1)
    struct.pack_into("<QIHH", pair.bytes, 0x4010, DATA + 2, 3, 0, 0)
    pair.bytes[DATA : DATA + 5] = b"hello"
    pair.driver.describe(0, 0x4000, 32, F_INDIRECT_DESC, 0)
    pair.offer(0)
    chain = pair.device.pop()
    assert chain is not None
    assert b"".join(chain[1]) == b"hello"


def test_a_buffer_across_two_regions() -> None:
    fd = os.memfd_create("two")
    os.truncate(fd, 8192)
    memory = GuestMemory()
    memory.add(0, 4096, 0, fd, 4096)
    memory.add(4096, 4096, 1 << 20, fd, 0)
    parts = memory.views(4090, 12)
    assert [len(part) for part in parts] == [6, 6]
    memory.clear()
    os.close(fd)


HOSTILE = {
    "head outside the table": [(0, DATA, 1, 0, 0)],
    "next outside the table": [(0, DATA, 1, F_NEXT, ENTRIES)],
    "loop": [(0, DATA, 1, F_NEXT, 1), (1, DATA, 1, F_NEXT, 0)],
    "self loop": [(0, DATA, 1, F_NEXT, 0)],
    "address outside": [(0, SIZE, 1, 0, 0)],
    "length outside": [(0, SIZE - 4, 5, F_WRITE, 0)],
    "address wraps": [(0, (1 << 64) - 1, 0xFFFFFFFF, 0, 0)],
    "indirect table outside": [(0, SIZE, 16, F_INDIRECT_DESC, 0)],
    "indirect table empty": [(0, 0x4000, 0, F_INDIRECT_DESC, 0)],
    "indirect table odd": [(0, 0x4000, 17, F_INDIRECT_DESC, 0)],
    "indirect table huge": [(0, 0x4000, 16 * (ENTRIES + 1), F_INDIRECT_DESC, 0)],
    "indirect with next": [(0, 0x4000, 16, F_INDIRECT_DESC | F_NEXT, 1)],
    "indirect within indirect": [(0, 0x1000, 16, F_INDIRECT_DESC, 0)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptors(pair: Pair, name: str) -> None:
    for descriptor in HOSTILE[name]:
        pair.driver.describe(*descriptor)
    pair.offer(ENTRIES if name.startswith("head") else 0)
    with pytest.raises(QueueError):
        pair.device.pop()


def test_index_that_jumps(pair: Pair) -> None:
    pair.driver.set_u16(pair.driver.available + 2, ENTRIES + 1)
    with pytest.raises(QueueError, match="jumped"):
        pair.device.pop()


@pytest.mark.parametrize("size", [0, 3, 12, 2048, 1 << 31])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(QueueError):
        Virtqueue.sizes(size)


descriptors = st.lists(
    st.tuples(
        st.one_of(st.integers(0, SIZE + 64), st.integers(0, (1 << 64) - 1)),
        st.one_of(st.integers(0, 300), st.integers(0, (1 << 32) - 1)),
        st.integers(0, 0xFFFF),
        st.integers(0, ENTRIES),
    ),
    min_size=ENTRIES,
    max_size=ENTRIES,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(descriptors, st.binary(max_size=256), st.integers(0, 0xFFFF), st.integers(0, ENTRIES + 1))
def test_no_ring_content_reaches_outside_memory(
    pair: Pair, table: list[tuple[int, int, int, int]], indirect: bytes, head: int, jump: int
) -> None:
    """Random rings give chains within memory, of bounded length, or QueueError."""
    pair.bytes[0x4000 : 0x4000 + len(indirect)] = indirect
    for index, descriptor in enumerate(table):
        pair.driver.describe(index, *descriptor)
    base = pair.device.next_avail
    pair.driver.set_u16(pair.driver.available + 4 + 2 * (base % ENTRIES), head)
    pair.driver.set_u16(pair.driver.available + 2, (base + jump) & 0xFFFF)
    try:
        chain = pair.device.pop()
    except QueueError:
        return
    if jump == 0:
        assert chain is None
        return
    assert chain is not None
    assert len(chain[1]) + len(chain[2]) <= ENTRIES
    for view in chain[1] + chain[2]:
        assert len(view) <= SIZE
        view.release()
