# SPDX-License-Identifier: Apache-2.0
"""What we have put into a network namespace that is not ours, and taking it away.

A tap goes with the VMM that holds it.  What stands on links of the pod does not: it is
recorded, so that `delete` finds it where a shim was killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shimv2.namespaces import call_inside
from shimv2.network import links
from shimv2.network import netlink as nl


class Trace(NamedTuple):
    """One thing of ours.

    Attributes:
        kind: a key of `_UNDO`.
        link, name: index and name of the link it stands on, or of the link that it is.
    """

    kind: str
    link: int
    name: str


_UNDO = {
    "ingress": links.delete_ingress,
    "redirect": links.delete_redirect,
    "rate": links.delete_rate,
    "link": links.delete,
}


def undo(kernel: nl.Netlink, traces: Iterable[Trace]) -> None:
    """Remove traces in the order given; what is gone already is no error.

    Raises:
        NetlinkError: the first one that could not be removed; all were tried.
    """
    failure: nl.NetlinkError | None = None
    for trace in traces:
        try:
            _UNDO[trace.kind](kernel, trace.link, trace.name)
        except nl.NetlinkError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def undo_in(path: str, inode: int, traces: Sequence[Trace]) -> None:
    """The same from outside, for a namespace that may be gone, or another one by now.

    Args:
        inode: of the namespace that the traces are in.

    Raises:
        OSError: one could not be removed.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # it took them along
    try:
        if os.fstat(fd).st_ino != inode:
            return
        with call_inside(fd, nl.Netlink) as kernel:
            undo(kernel, traces)
    finally:
        os.close(fd)
