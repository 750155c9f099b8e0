# SPDX-License-Identifier: Apache-2.0
"""The back-end's half of a vhost-user session: features, memory and rings.

Synchronous, and does no I/O on the session's socket: `handle` takes a message and returns the
reply.  What runs on the rings is told through `RingUser`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from typing import Protocol

from vmm.vsock import vhost_user as vu
from vmm.vsock.guest_memory import MAX_REGIONS, GuestFault, GuestMemory
from vmm.vsock.virtqueue import QueueError, Virtqueue

_log = logging.getLogger(__name__)

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
_F_PROTOCOL_FEATURES = 1 << 30
_F_VERSION_1 = 1 << 32

FEATURES = _F_VERSION_1 | _F_PROTOCOL_FEATURES | F_EVENT_IDX | F_INDIRECT_DESC
PROTOCOL_FEATURES = (
    vu.F_MQ | vu.F_REPLY_ACK | vu.F_CONFIG | vu.F_RESET_DEVICE | vu.F_CONFIGURE_MEM_SLOTS
)

RX, TX, EVENT = 0, 1, 2
#: QEMU serves the event queue itself and hands over two; a front-end may hand over all.
QUEUES = 3

_ONE = struct.pack("<Q", 1)


class Ring:
    """What the front-end has said about one ring, and the queue once it can be used."""

    __slots__ = (
        "addresses",
        "base",
        "broken",
        "call_fd",
        "enabled",
        "err_fd",
        "index",
        "kick_fd",
        "queue",
        "size",
        "started",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None
        self.base = 0
        self.kick_fd = -1
        self.call_fd = -1
        self.err_fd = -1
        self.started = False
        # Front-ends before QEMU 7.2 never enable a vsock's rings, they only start them.
        self.enabled = True
        self.broken = False
        self.queue: Virtqueue | None = None

    def call(self) -> None:
        """Interrupt the driver."""
        if self.call_fd >= 0:
            with contextlib.suppress(BlockingIOError):  # full: it has been told already
                os.write(self.call_fd, _ONE)

    def fail(self) -> None:
        """The driver broke the ring: say so, and leave it alone until it is set up anew."""
        self.detach()
        self.broken = True
        if self.err_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self.err_fd, _ONE)

    def detach(self) -> None:
        """Let go of the ring's memory; `base` remembers where it stood."""
        if self.queue is not None:
            self.base = self.queue.next_avail
            self.queue.release()
            self.queue = None

    def close_fds(self) -> None:
        for name in ("kick_fd", "call_fd", "err_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


class RingUser(Protocol):
    """Who works on the rings.  Called synchronously, between two of its own steps."""

    def rings_started(self, rings: list[Ring]) -> None:
        """The set of usable rings changed (never called in the middle of a change)."""

    def ring_stopping(self, ring: Ring) -> None:
        """`ring`, its kick descriptor and its queue go away after this call."""

    def guest_reset(self) -> None:
        """The driver starts from nothing: every connection is gone on the guest's side."""


class Backend:
    """One session with a front-end.  Owns the memory, the rings and every descriptor taken."""

    def __init__(self, cid: int, user: RingUser) -> None:
        self.memory = GuestMemory()
        self.rings = [Ring(i) for i in range(QUEUES)]
        self.features = 0
        self.protocol_features = 0
        self._config = struct.pack("<Q", cid)
        self._user = user

    def close(self) -> None:
        """End of the session: nothing of it stays mapped or open."""
        for ring in self.rings:
            self._stop(ring)
            ring.close_fds()
        self.memory.clear()

    def handle(self, message: vu.Message) -> bytes | None:
        """Do what one message says; returns the reply to send.

        Raises:
            VhostUserError: it makes no sense.  The session is to be closed.
        """
        try:
            reply = self._dispatch(message)
        except (GuestFault, QueueError) as error:
            if not (message.need_reply and self.protocol_features & vu.F_REPLY_ACK):
                raise vu.VhostUserError(str(error)) from error
            _log.warning("vhost-user request %d refused: %s", message.request, error)
            return vu.reply_u64(message.request, 1)
        finally:
            message.close()
        if reply is None and message.need_reply and self.protocol_features & vu.F_REPLY_ACK:
            return vu.reply_u64(message.request, 0)
        return reply

    def _dispatch(self, message: vu.Message) -> bytes | None:
        request = message.request
        match request:
            case vu.GET_FEATURES:
                return vu.reply_u64(request, FEATURES)
            case vu.SET_FEATURES:
                self.features = message.u64() & FEATURES
            case vu.GET_PROTOCOL_FEATURES:
                return vu.reply_u64(request, PROTOCOL_FEATURES)
            case vu.SET_PROTOCOL_FEATURES:
                self.protocol_features = message.u64() & PROTOCOL_FEATURES
            case vu.SET_OWNER:
                pass
            case vu.RESET_OWNER | vu.RESET_DEVICE:
                for ring in self.rings:
                    self._stop(ring)
                    ring.base = 0
                self._user.guest_reset()
            case vu.GET_QUEUE_NUM:
                return vu.reply_u64(request, QUEUES)
            case vu.GET_MAX_MEM_SLOTS:
                return vu.reply_u64(request, MAX_REGIONS)
            case vu.SET_MEM_TABLE | vu.ADD_MEM_REG | vu.REM_MEM_REG:
                self._change_memory(message)
            case vu.GET_CONFIG:
                offset, size = message.config()
                whole = size > 0 and offset + size <= len(self._config)
                return vu.reply_config(
                    offset, self._config[offset : offset + size] if whole else b""
                )
            case vu.SET_CONFIG:
                raise GuestFault("the configuration of a vsock device can't be written")
            case _:
                return self._vring(message)
        return None

    def _vring(self, message: vu.Message) -> bytes | None:
        request = message.request
        match request:
            case vu.SET_VRING_NUM:
                index, size = message.vring_state()
                Virtqueue.sizes(size)
                ring = self._idle_ring(index)
                ring.size = size
            case vu.SET_VRING_ADDR:
                index, descriptors, available, used = message.vring_addr()
                ring = self._ring(index)
                self._detach(ring)
                ring.addresses = (descriptors, available, used)
                self._attach()
            case vu.SET_VRING_BASE:
                index, base = message.vring_state()
                ring = self._idle_ring(index)
                # A VM that was paused goes on where it stood; a driver that starts from
                # nothing has no connections any more.
                if index == TX and (base & 0xFFFF) == 0 and ring.base:
                    self._user.guest_reset()
                ring.base = base & 0xFFFF
                ring.broken = False
            case vu.GET_VRING_BASE:
                index, _ = message.vring_state()
                ring = self._ring(index)
                self._stop(ring)
                return vu.reply_vring_state(request, index, ring.base)
            case vu.SET_VRING_ENABLE:
                index, on = message.vring_state()
                ring = self._ring(index)
                if not on:
                    self._detach(ring)
                ring.enabled = bool(on)
                self._attach()
            case vu.SET_VRING_KICK | vu.SET_VRING_CALL | vu.SET_VRING_ERR:
                self._set_fd(message)
            case _:
                raise vu.VhostUserError(f"request {request} was not offered")
        return None

    def _set_fd(self, message: vu.Message) -> None:
        value = message.u64()
        ring = self._ring(value & vu.VRING_INDEX)
        fd = -1 if value & vu.VRING_NO_FD else message.take_fd()
        if fd >= 0:
            os.set_blocking(fd, False)
        match message.request:
            case vu.SET_VRING_CALL:
                old, ring.call_fd = ring.call_fd, fd
            case vu.SET_VRING_ERR:
                old, ring.err_fd = ring.err_fd, fd
            case _:
                self._stop(ring)
                if fd < 0:
                    raise vu.VhostUserError("polled rings were not offered")
                old, ring.kick_fd = ring.kick_fd, fd
                ring.started = True
        if old >= 0:
            os.close(old)
        self._attach()

    def _ring(self, index: int) -> Ring:
        if index >= QUEUES:
            raise vu.VhostUserError(f"ring {index} of {QUEUES}")
        return self.rings[index]

    def _idle_ring(self, index: int) -> Ring:
        ring = self._ring(index)
        if ring.queue is not None:
            raise vu.VhostUserError(f"ring {index} changed while it runs")
        return ring

    def _change_memory(self, message: vu.Message) -> None:
        for ring in self.rings:
            self._detach(ring)
        if message.request == vu.SET_MEM_TABLE:
            regions = message.regions()
            self.memory.clear()
            for region, fd in zip(regions, message.fds, strict=True):
                self._add_region(region, fd)
        elif message.request == vu.ADD_MEM_REG:
            fd = message.take_fd()
            try:
                self._add_region(message.region(), fd)
            finally:
                os.close(fd)
        else:
            start, size, user_start, _ = message.region()
            self.memory.remove(start, size, user_start)
        self._attach()

    def _add_region(self, region: tuple[int, int, int, int], fd: int) -> None:
        start, size, user_start, offset = region
        self.memory.add(start, size, user_start, fd, offset)

    def _attach(self) -> None:
        """Take into use every ring of which enough is known.  A ring whose memory is away for
        the moment (it is being moved) waits for the next change of memory."""
        changed = False
        for ring in self.rings:
            if (
                ring.queue is None
                and ring.started
                and ring.enabled
                and not ring.broken
                and ring.size
                and ring.addresses is not None
            ):
                try:
                    descriptors, available, used = [
                        self.memory.user_view(address, length)
                        for address, length in zip(
                            ring.addresses, Virtqueue.sizes(ring.size), strict=True
                        )
                    ]
                except GuestFault as fault:
                    _log.debug("ring %d not usable yet: %s", ring.index, fault)
                    continue
                ring.queue = Virtqueue(
                    self.memory,
                    descriptors,
                    available,
                    used,
                    ring.size,
                    ring.base,
                    bool(self.features & F_EVENT_IDX),
                )
                changed = True
        if changed:
            self._user.rings_started(self.rings)

    def _detach(self, ring: Ring) -> None:
        if ring.queue is not None:
            self._user.ring_stopping(ring)
            ring.detach()

    def _stop(self, ring: Ring) -> None:
        self._detach(ring)
        ring.started = False
        if ring.kick_fd >= 0:
            os.close(ring.kick_fd)
            ring.kick_fd = -1
