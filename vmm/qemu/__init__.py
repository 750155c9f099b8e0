# SPDX-License-Identifier: Apache-2.0
"""QEMU (7.2 and later) as a driver."""

from vmm.qemu.driver import Qemu

__all__ = ["Qemu"]
