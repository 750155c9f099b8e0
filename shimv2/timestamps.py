# SPDX-License-Identifier: Apache-2.0
"""google.protobuf.Timestamp, whose own methods a shim goes without (`ttrpc.upb`)."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

_SECOND = 1_000_000_000


def put(stamp: Timestamp, nanoseconds: int) -> None:
    """Fill in a time, given since the epoch."""
    stamp.seconds, stamp.nanos = divmod(nanoseconds, _SECOND)


def timestamp(nanoseconds: int) -> Timestamp:
    """The message for a time since the epoch."""
    stamp = Timestamp()
    put(stamp, nanoseconds)
    return stamp
