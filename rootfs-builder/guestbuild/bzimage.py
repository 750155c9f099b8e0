# SPDX-License-Identifier: Apache-2.0
"""Takes the ELF kernel out of a compressed bzImage.

The header's fields are described in the kernel's Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess

_SIGNATURE = 0x202  # "HdrS"
_SETUP_SECTORS = 0x1F1
_VERSION = 0x206  # boot protocol; payload fields exist from 2.08 on
_PAYLOAD = 0x248  # offset (from the protected-mode code) and length, 32 bits each
_ELF = b"\x7fELF"


def vmlinux(image: bytes) -> bytes:
    """The uncompressed kernel.

    Raises:
        ValueError: Not a bzImage, or compressed in an unknown way.
    """
    if len(image) < 0x260 or image[_SIGNATURE : _SIGNATURE + 4] != b"HdrS":
        raise ValueError("not a bzImage")
    (protocol,) = struct.unpack_from("<H", image, _VERSION)
    if protocol < 0x208:
        raise ValueError(f"boot protocol {protocol:#x} has no payload fields")
    sectors = image[_SETUP_SECTORS] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if len(payload) != length:
        raise ValueError("the kernel's payload is cut short")
    kernel = _decompress(payload)
    if not kernel.startswith(_ELF):
        raise ValueError("the payload is no ELF file")
    return kernel


def _decompress(payload: bytes) -> bytes:
    """Decompress by the payload's magic; four bytes after it hold the plain size."""
    if payload.startswith(_ELF):
        return payload
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload[:-4])
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _filter(["zstd", "-dc"], payload[:-4])
    if payload.startswith(b"\x02\x21\x4c\x18"):
        return _filter(["lz4", "-dc"], payload[:-4])
    raise ValueError(f"unknown compression {payload[:4].hex()}")


def _filter(command: list[str], data: bytes) -> bytes:
    result = subprocess.run(command, input=data, capture_output=True, check=False)
    if result.returncode and not result.stdout.startswith(_ELF):
        raise ValueError(f"{command[0]}: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout
