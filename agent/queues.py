# SPDX-License-Identifier: Apache-2.0
"""The queues of the guest's interfaces follow its CPUs.

virtio-net takes as many pairs as CPUs run when it finds its device, and keeps to that.  CPUs that
are brought up later get theirs here, by ethtool's ioctl, as far as the device has them.
"""

from __future__ import annotations

import os
from array import array

from agent import log

_SIOCETHTOOL = 0x8946  # linux/sockios.h
_GET_CHANNELS = 0x3C  # linux/ethtool.h: ETHTOOL_GCHANNELS
_SET_CHANNELS = 0x3D
# struct ethtool_channels, of __u32: cmd, four maxima (rx, tx, other, combined), four counts.
_LENGTH, _MAX_COMBINED, _COMBINED = 9, 4, 8
_NAME_SIZE, _IFREQ_SIZE = 16, 40  # linux/if.h


def follow_cpus(cpus: int, sysfs: str = "/sys") -> None:
    """Let each interface use a pair of queues for each of `cpus`; none gets fewer than it has."""
    from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM, socket

    control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        for name in os.listdir(f"{sysfs}/class/net"):
            _follow(control.fileno(), name, cpus)
    finally:
        control.close()


def _follow(control: int, name: str, cpus: int) -> None:
    from fcntl import ioctl

    channels = array("I", [_GET_CHANNELS, *[0] * (_LENGTH - 1)])
    address = channels.buffer_info()[0].to_bytes(8, "little")
    request = (name.encode().ljust(_NAME_SIZE, b"\0") + address).ljust(_IFREQ_SIZE, b"\0")
    try:
        ioctl(control, _SIOCETHTOOL, request)
    except OSError:  # lo and tunnels have no queues to set
        return
    wanted = min(channels[_MAX_COMBINED], cpus)
    if wanted <= channels[_COMBINED]:
        return
    channels[0], channels[_COMBINED] = _SET_CHANNELS, wanted
    try:
        ioctl(control, _SIOCETHTOOL, request)
    except OSError as error:
        log.warning("an interface keeps its queues", interface=name, error=str(error))
