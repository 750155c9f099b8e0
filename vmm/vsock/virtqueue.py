# SPDX-License-Identifier: Apache-2.0
"""The device's side of a split virtqueue (virtio 1.2, section 2.7), over memoryviews.

The driver's memory is hostile: it may change at any time, so each value is read once, and
each index, address, length and chain is checked before use.  Indices are 16-bit, free-running.
"""

from __future__ import annotations

import struct
import threading

from vmm.vsock.guest_memory import GuestFault, GuestMemory

_DESCRIPTOR = struct.Struct("<QIHH")  # addr, len, flags, next
_USED = struct.Struct("<II")  # id, len

_F_NEXT = 1
_F_WRITE = 2
_F_INDIRECT = 4
_AVAIL_F_NO_INTERRUPT = 1
_USED_F_NO_NOTIFY = 1

MAX_SIZE = 1024

_fence = threading.Lock()

#: head, segments to read, segments to write
Chain = tuple[int, list[memoryview], list[memoryview]]


class QueueError(Exception):
    """The driver broke the rules of the ring; it can't be used until it is set up again."""


def _barrier() -> None:
    """Make our stores visible before our next loads.

    x86 reorders nothing else; taking a lock is a locked instruction there, which is a full
    fence.
    """
    _fence.acquire()
    _fence.release()


class Virtqueue:
    """One ring in use.  `pop` takes chains, `push` gives them back, `publish` shows what was
    pushed to the driver; `release` lets go of the memory.

    Args:
        memory: where the chains' buffers lie.
        descriptors, available, used: the three parts of the ring (see `sizes`).
        size: entries, a power of two up to MAX_SIZE.
        base: index of the first entry to take (0, or what an earlier user of the ring left).
        event_idx: VIRTIO_RING_F_EVENT_IDX was negotiated.
    """

    __slots__ = (
        "_available",
        "_descriptors",
        "_event_idx",
        "_mask",
        "_memory",
        "_published",
        "_used",
        "_used_bytes",
        "next_avail",
        "next_used",
        "size",
    )

    def __init__(
        self,
        memory: GuestMemory,
        descriptors: memoryview,
        available: memoryview,
        used: memoryview,
        size: int,
        base: int,
        event_idx: bool,
    ) -> None:
        self._memory = memory
        self._descriptors = descriptors
        self._available = available.cast("H")
        self._used_bytes = used
        self._used = used.cast("H")
        self._mask = size - 1
        self._event_idx = event_idx
        self.size = size
        self.next_avail = base
        # All that was taken has been given back when a ring changes hands, so both sides
        # stand at the same index.
        self.next_used = self._published = base
        self._used[1] = base

    @staticmethod
    def sizes(size: int) -> tuple[int, int, int]:
        """Bytes of the descriptor table, the available and the used ring, event words included.

        Raises:
            QueueError: not a power of two, or too large.
        """
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise QueueError(f"queue size {size}")
        return 16 * size, 6 + 2 * size, 6 + 8 * size

    def release(self) -> None:
        """Let go of the ring's memory."""
        self._descriptors.release()
        self._available.release()
        self._used.release()
        self._used_bytes.release()

    def pop(self) -> Chain | None:
        """Take the next chain the driver has offered, or None.

        Raises:
            QueueError: a bad index, descriptor, length or address, or a loop.
        """
        index = self.next_avail
        waiting = (self._available[1] - index) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise QueueError(f"available index jumped by {waiting} in a queue of {self.size}")
        head = self._available[2 + (index & self._mask)]
        chain = self._walk(head)
        self.next_avail = (index + 1) & 0xFFFF
        return chain

    def unpop(self, count: int = 1) -> None:
        """Put the last `count` chains taken back to where they were."""
        self.next_avail = (self.next_avail - count) & 0xFFFF

    def _walk(self, head: int) -> Chain:
        table = self._descriptors
        limit = self.size
        index = head
        budget = limit  # descriptors that this chain may still have: ends loops
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        try:
            while True:
                if index >= limit:
                    raise QueueError(f"descriptor index {index} in a table of {limit}")
                budget -= 1
                if budget < 0:
                    raise QueueError("descriptor chain is longer than the queue")
                address, length, flags, following = _DESCRIPTOR.unpack_from(table, index << 4)
                if flags & _F_INDIRECT:
                    if table is not self._descriptors or flags & _F_NEXT:
                        raise QueueError("indirect descriptor within or before another")
                    limit, rest = divmod(length, 16)
                    if rest or not 0 < limit <= self.size:
                        raise QueueError(f"indirect table of {length} bytes")
                    table = self._memory.view(address, length)
                    index = 0
                    continue
                side = writable if flags & _F_WRITE else readable
                if length:
                    try:
                        side.append(self._memory.view(address, length))
                    except GuestFault:
                        side.extend(self._memory.views(address, length))
                if not flags & _F_NEXT:
                    return head, readable, writable
                index = following
        except GuestFault as fault:
            raise QueueError(str(fault)) from None

    def push(self, head: int, written: int) -> None:
        """Give a chain back, with the bytes written to it.  Not seen before `publish`."""
        _USED.pack_into(self._used_bytes, 4 + ((self.next_used & self._mask) << 3), head, written)
        self.next_used = (self.next_used + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show the driver what was pushed; True if it wants to be interrupted for that."""
        old, new = self._published, self.next_used
        if old == new:
            return False
        self._used[1] = new
        self._published = new
        _barrier()
        if self._event_idx:
            event = self._available[2 + self.size]
            return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        return not self._available[0] & _AVAIL_F_NO_INTERRUPT

    def disable_kick(self) -> None:
        """Ask the driver not to kick: we look at the ring anyway.  With event indices there is
        nothing to do, a kick comes only for the index asked for last."""
        if not self._event_idx:
            self._used[0] = _USED_F_NO_NOTIFY

    def enable_kick(self) -> bool:
        """Ask for a kick at the next chain; True if one is there already (look again)."""
        if self._event_idx:
            self._used[2 + 4 * self.size] = self.next_avail
        else:
            self._used[0] = 0
        _barrier()
        return self._available[1] != self.next_avail
