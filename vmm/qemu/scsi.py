# SPDX-License-Identifier: Apache-2.0
"""Which address each disk gets on the virtio-scsi controller: target and LUN.

As Kata counts them: disk number n has target n / 256 and LUN n % 256.
"""

from __future__ import annotations

from vmm.errors import CapacityError

_LUNS = 256
_TARGETS = 256


class ScsiBus:
    """Who sits where."""

    def __init__(self) -> None:
        self._taken: dict[int, str] = {}

    def take(self, device_id: str) -> tuple[int, int]:
        """The first free target and LUN.

        Raises:
            CapacityError: there is none.
        """
        for number in range(_TARGETS * _LUNS):
            if number not in self._taken:
                self._taken[number] = device_id
                return divmod(number, _LUNS)
        raise CapacityError(f"no SCSI address left for {device_id}")

    def release(self, device_id: str) -> None:
        """Without effect if it has none."""
        self._taken = {n: other for n, other in self._taken.items() if other != device_id}
