# SPDX-License-Identifier: Apache-2.0
"""The starts that this host has kept, each seen once by who remembers how far it was."""

from __future__ import annotations

import logging

from shimv2.boot import history
from shimv2.boot.history import BootRecord

log = logging.getLogger("kata-monitor")

Place = tuple[int, str]

BEGINNING: Place = (0, "")


def place_of(record: BootRecord) -> Place:
    """Where it stands among all starts of a host."""
    return record.started, record.id


def later_than(place: Place) -> list[BootRecord]:
    """Oldest first; none, and a warning, if they can't be read."""
    try:
        records = history.load(history.HISTORY)
    except OSError as error:
        log.warning("%s: %s", history.HISTORY, error.strerror)
        return []
    return [record for record in records if place_of(record) > place]
