# SPDX-License-Identifier: Apache-2.0
"""Changes to links and to their traffic control, as netlink messages."""

from __future__ import annotations

import errno
import struct

from shimv2.network import netlink as nl
from shimv2.network.snapshot import IFF_UP

# linux/if_link.h
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_AF_SPEC = (
    1, 3, 4, 5, 18, 26,
)  # fmt: skip
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_MACVLAN_MODE, _MACVLAN_MODE_PASSTHRU = 1, 8
_IFLA_INET6_ADDR_GEN_MODE, _IN6_ADDR_GEN_MODE_NONE = 8, 1
_AF_INET6 = 10

# linux/pkt_sched.h, linux/rtnetlink.h
_TC_H_ROOT, _TC_H_INGRESS = 0xFFFFFFFF, 0xFFFFFFF1
_INGRESS_HANDLE = 0xFFFF0000
_INGRESS_FILTERS = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS): of clsact as well
_TCA_KIND, _TCA_OPTIONS = 1, 2
_ETH_P_ALL = 0x0003
_PRIORITY = 0x6B61  # of our filters, so that they are found again

# linux/pkt_cls.h
_TCA_U32_SEL, _TCA_U32_ACT = 5, 7
_TC_U32_TERMINAL = 1
_U32_SELECTOR = struct.Struct(">BBBxHHhhI")  # flags, shift, keys, masks and offsets
_U32_KEY = struct.Struct(">IIii")  # mask, value, offset, mask of the offset
_TCA_ACT_KIND, _TCA_ACT_OPTIONS = 1, 2
_TCA_MIRRED_PARMS = 2
_MIRRED = struct.Struct("=IIiiiiI")  # index, capab, action, refcnt, bindcnt, eaction, ifindex
_TC_ACT_STOLEN, _TCA_EGRESS_REDIR = 4, 1

_TCA_TBF_PARMS, _TCA_TBF_RATE64, _TCA_TBF_BURST = 1, 4, 6
_RATE = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, mpu, rate
_TC_LINKLAYER_ETHERNET = 1


def set_up(kernel: nl.Netlink, index: int, name: str, mtu: int) -> None:
    """Bring one of our links up, silent: it gets no IPv6 address to announce."""
    mode = nl.attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE]))
    families = nl.attribute(_IFLA_AF_SPEC, nl.attribute(_AF_INET6, mode))
    try:
        kernel.change(name, nl.RTM_NEWLINK, nl.LINK.pack(0, 0, index, 0, 0) + families)
    except nl.NetlinkError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):  # a kernel without IPv6
            raise
    body = nl.LINK.pack(0, 0, index, IFF_UP, IFF_UP) + nl.number(_IFLA_MTU, mtu)
    kernel.change(f"{name} up", nl.RTM_NEWLINK, body)


def add_macvtap(kernel: nl.Netlink, name: str, lower: int) -> None:
    """A macvtap that takes all frames of the link `lower` and has its MAC."""
    data = nl.number(_IFLA_MACVLAN_MODE, _MACVLAN_MODE_PASSTHRU)
    info = nl.text(_IFLA_INFO_KIND, "macvtap") + nl.attribute(_IFLA_INFO_DATA, data)
    body = nl.LINK.pack(0, 0, 0, 0, 0) + nl.text(_IFLA_IFNAME, name)
    body += nl.number(_IFLA_LINK, lower) + nl.attribute(_IFLA_LINKINFO, info)
    flags = nl.NLM_F_CREATE | nl.NLM_F_EXCL
    kernel.change(f"macvtap {name}", nl.RTM_NEWLINK, body, flags)


def delete(kernel: nl.Netlink, index: int, name: str) -> None:
    """Delete a link; one that is gone already is no error."""
    _forgive(kernel, f"delete {name}", nl.RTM_DELLINK, nl.LINK.pack(0, 0, index, 0, 0))


def add_ingress(kernel: nl.Netlink, index: int, name: str) -> bool:
    """A place for filters of incoming frames.

    Returns:
        False if there was one already.
    """
    body = nl.TC.pack(0, index, _INGRESS_HANDLE, _TC_H_INGRESS, 0) + nl.text(_TCA_KIND, "ingress")
    try:
        kernel.change(f"ingress of {name}", nl.RTM_NEWQDISC, body, nl.NLM_F_CREATE | nl.NLM_F_EXCL)
    except nl.NetlinkError as error:
        if error.errno != errno.EEXIST:
            raise
        return False
    return True


def delete_ingress(kernel: nl.Netlink, index: int, name: str) -> None:
    """Remove what `add_ingress` made, with all filters; gone already is no error."""
    body = nl.TC.pack(0, index, _INGRESS_HANDLE, _TC_H_INGRESS, 0)
    _forgive(kernel, f"ingress of {name}", nl.RTM_DELQDISC, body)


def redirect(kernel: nl.Netlink, index: int, name: str, target: int) -> None:
    """Every frame that comes in at a link goes out at `target`."""
    action = nl.text(_TCA_ACT_KIND, "mirred") + nl.attribute(
        _TCA_ACT_OPTIONS,
        nl.attribute(
            _TCA_MIRRED_PARMS,
            _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, target),
        ),
    )
    selector = _U32_SELECTOR.pack(_TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0)
    options = nl.attribute(_TCA_U32_SEL, selector + _U32_KEY.pack(0, 0, 0, 0))
    options += nl.attribute(_TCA_U32_ACT, nl.attribute(1, action))
    body = _filter(index) + nl.text(_TCA_KIND, "u32") + nl.attribute(_TCA_OPTIONS, options)
    flags = nl.NLM_F_CREATE | nl.NLM_F_EXCL
    kernel.change(f"redirect {name}", nl.RTM_NEWTFILTER, body, flags)


def delete_redirect(kernel: nl.Netlink, index: int, name: str) -> None:
    """Undo `redirect`; gone already is no error."""
    _forgive(kernel, f"redirect {name}", nl.RTM_DELTFILTER, _filter(index))


def limit_rate(kernel: nl.Netlink, index: int, name: str, bits_per_second: int) -> None:
    """Hold what goes out at a link to a rate, with bursts of 20 ms and a queue of 50 ms."""
    rate = max(1, bits_per_second // 8)
    burst = min(max(rate // 50, _LEAST_BURST), 0xFFFFFFFF)
    limit = min(burst + max(rate // 20, _LEAST_BURST), 0xFFFFFFFF)
    plain = _RATE.pack(0, _TC_LINKLAYER_ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
    none = bytes(_RATE.size)
    options = nl.attribute(_TCA_TBF_PARMS, plain + none + struct.pack("=III", limit, 0, 0))
    options += nl.number(_TCA_TBF_BURST, burst)
    if rate > 0xFFFFFFFF:
        options += nl.attribute(_TCA_TBF_RATE64, struct.pack("=Q", rate))
    body = nl.TC.pack(0, index, 0, _TC_H_ROOT, 0) + nl.text(_TCA_KIND, "tbf")
    body += nl.attribute(_TCA_OPTIONS, options)
    flags = nl.NLM_F_CREATE | nl.NLM_F_REPLACE
    kernel.change(f"rate of {name}", nl.RTM_NEWQDISC, body, flags)


def delete_rate(kernel: nl.Netlink, index: int, name: str) -> None:
    """Undo `limit_rate`; gone already is no error."""
    body = nl.TC.pack(0, index, 0, _TC_H_ROOT, 0)
    _forgive(kernel, f"rate of {name}", nl.RTM_DELQDISC, body)


_LEAST_BURST = 128 << 10  # bytes: a segmentation-offloaded frame has 64 KiB


def _filter(index: int) -> bytes:
    information = _PRIORITY << 16 | struct.unpack("=H", struct.pack(">H", _ETH_P_ALL))[0]
    return nl.TC.pack(0, index, 0, _INGRESS_FILTERS, information)


def _forgive(kernel: nl.Netlink, what: str, kind: int, body: bytes) -> None:
    try:
        kernel.change(what, kind, body)
    except nl.NetlinkError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            raise
