# SPDX-License-Identifier: Apache-2.0
"""The pod's network namespace, from outside: read, and given taps.

Every call here may wait for the kernel's network lock, which a busy host can hold for a
while: make them on a worker thread, one at a time.
"""

from __future__ import annotations

import contextlib
import os
import socket
from types import TracebackType
from typing import Self

from shimv2.namespaces import call_inside
from shimv2.network import links, macvtap, snapshot
from shimv2.network import netlink as nl
from shimv2.network.snapshot import Link, Snapshot
from shimv2.network.tap import TapError, open_tap
from shimv2.network.traces import Trace, undo

_CHANGES = (
    nl.RTMGRP_LINK
    | nl.RTMGRP_NEIGH
    | nl.RTMGRP_IPV4_IFADDR
    | nl.RTMGRP_IPV4_ROUTE
    | nl.RTMGRP_IPV6_IFADDR
    | nl.RTMGRP_IPV6_ROUTE
)


class PodNamespace:
    """A context manager that owns its sockets in the namespace.

    Args:
        fd: of the namespace; it stays the caller's and has to stay open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._kernel = self._stack.enter_context(call_inside(self._fd, nl.Netlink))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def monitor(self) -> socket.socket:
        """A socket that becomes readable when something here changes; the caller closes it."""
        return call_inside(self._fd, lambda: nl.monitor_socket(_CHANGES))

    def snapshot(self) -> Snapshot:
        """What is here now.

        Raises:
            OSError: the kernel did not answer.
        """
        return snapshot.take(self._kernel)

    def attach_tap(self, link: Link, queues: int) -> Wire:
        """Connect a link with a new tap by traffic control, both ways.

        Raises:
            TapError, NetlinkError: nothing is left of it then.
        """
        name = self._free_name(link)
        wire = Wire(self._kernel, call_inside(self._fd, lambda: open_tap(name, queues)))
        try:
            wire.tap = tap = self._index_of(name)
            wire.tap_name = name
            links.set_up(self._kernel, tap, name, link.mtu)
            if links.add_ingress(self._kernel, link.index, link.name):
                wire.leaves("ingress", link.index, link.name)
            else:  # somebody else's, who keeps it, or of a shim that was killed
                links.delete_redirect(self._kernel, link.index, link.name)
                wire.leaves("redirect", link.index, link.name)
            links.add_ingress(self._kernel, tap, name)
            links.redirect(self._kernel, link.index, link.name, tap)
            links.redirect(self._kernel, tap, name, link.index)
        except BaseException:
            wire.cut()
            raise
        wire.link, wire.link_name = link.index, link.name
        wire.shapes_inbound = True
        return wire

    def attach_macvtap(self, link: Link, queues: int) -> Wire:
        """Connect a link with a new macvtap that takes all its frames.

        Raises:
            TapError, NetlinkError: nothing is left of it then.
        """
        name = self._free_name(link)
        links.add_macvtap(self._kernel, name, link.index)
        wire = Wire(self._kernel, [])
        try:
            wire.tap = index = self._index_of(name)
            wire.tap_name = name
            wire.leaves("link", index, name)
            links.set_up(self._kernel, index, name, link.mtu)
            wire.fds.extend(call_inside(self._fd, lambda: macvtap.open_queues(name, queues)))
        except BaseException:
            wire.cut()
            raise
        wire.link, wire.link_name = link.index, link.name
        return wire

    def _free_name(self, link: Link) -> str:
        """Of the tap for a link; what a killed shim left under that name is removed."""
        name = f"tap{link.index}_kata"
        for other in self.snapshot().links:
            if other.name == name:
                links.delete(self._kernel, other.index, name)
        return name

    def _index_of(self, name: str) -> int:
        for link in self.snapshot().links:
            if link.name == name:
                return link.index
        raise TapError(2, f"tap {name} vanished")


class Wire:
    """The connection of one link with the VM.

    Attributes:
        fds: a descriptor for each queue pair, to be given to the VMM, then `close_fds`.
        tap, link: indexes of our end and of the pod's; `tap_name` and `link_name` go with them.
        traces: what stands in the pod's namespace because of it.
        shapes_inbound: whether frames to the VM pass our end's queue, and can be limited.
    """

    def __init__(self, kernel: nl.Netlink, fds: list[int]) -> None:
        self.fds = fds
        self.tap = self.link = 0
        self.tap_name = self.link_name = ""
        self.shapes_inbound = False
        self._kernel = kernel
        self.traces: list[Trace] = []

    def leaves(self, kind: str, index: int, name: str) -> None:
        """Note a trace in the pod's namespace, to be removed before those noted earlier."""
        self.traces.insert(0, Trace(kind, index, name))

    def set_mtu(self, mtu: int) -> None:
        """Follow the pod's link.

        Raises:
            NetlinkError: the kernel refuses.
        """
        links.set_up(self._kernel, self.tap, self.tap_name, mtu)

    def limit(self, *, inbound: int, outbound: int) -> None:
        """Hold the VM to so many bits per second each way; 0 is no limit.

        Raises:
            NetlinkError: the kernel can't.
        """
        if inbound and self.shapes_inbound:
            links.limit_rate(self._kernel, self.tap, self.tap_name, inbound)
        if outbound:
            links.limit_rate(self._kernel, self.link, self.link_name, outbound)
            self.leaves("rate", self.link, self.link_name)

    def close_fds(self) -> None:
        """The VMM has its own now.  Idempotent."""
        while self.fds:
            os.close(self.fds.pop())

    def cut(self) -> None:
        """Leave the namespace as it was found, as far as it is still there.  Idempotent.

        Raises:
            NetlinkError: the first thing that could not be undone; all were tried.
        """
        self.close_fds()
        traces, self.traces = self.traces, []
        undo(self._kernel, traces)
