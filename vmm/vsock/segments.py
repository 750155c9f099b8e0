# SPDX-License-Identifier: Apache-2.0
"""Lists of memoryviews as one run of bytes, without copying."""

from __future__ import annotations

from vmm.vsock.virtqueue import QueueError


def write_header(buffers: list[memoryview], header: bytes) -> None:
    """Raises QueueError if the buffers are too small."""
    if buffers and len(buffers[0]) >= len(header):
        buffers[0][: len(header)] = header
        return
    offset = 0
    for buffer in buffers:
        part = header[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        offset += len(part)
    if offset < len(header):
        raise QueueError(f"receive buffer of {offset} bytes")


def cut(segments: list[memoryview], count: int) -> bytes:
    """Take up to `count` bytes off the front of `segments`."""
    taken = bytearray()
    while segments and len(taken) < count:
        part = segments[0][: count - len(taken)]
        taken += part
        if len(part) < len(segments[0]):
            segments[0] = segments[0][len(part) :]
        else:
            del segments[0]
    return bytes(taken)


def skip(segments: list[memoryview], count: int) -> list[memoryview]:
    """`segments` without their first `count` bytes."""
    rest = []
    for segment in segments:
        if count >= len(segment):
            count -= len(segment)
        else:
            rest.append(segment[count:])
            count = 0
    return rest


def trim(segments: list[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of `segments`, or all."""
    kept = []
    for segment in segments:
        if not count:
            break
        kept.append(segment[:count])
        count -= len(kept[-1])
    return kept
