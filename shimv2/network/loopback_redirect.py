# SPDX-License-Identifier: Apache-2.0
"""Sends connections to a namespace's loopback addresses to listeners of ours, for any port.

It is a BPF program at the point where the kernel looks for a listener (sk_lookup, Linux 5.9):
no packet is changed and no netfilter rule is made, so the socket accepted still knows which
address and port were dialled, and all of it is gone with its descriptors, however we end.

Numbers are those of linux/bpf.h and linux/bpf_common.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import struct
import sys
from collections.abc import Iterator

_SYSCALLS = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _MAP_UPDATE_ELEM, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_MAP_TYPE_SOCKMAP = 15
_PROG_TYPE_SK_LOOKUP, _ATTACH_SK_LOOKUP = 30, 36

# Offsets in struct bpf_sk_lookup.
_FAMILY, _PROTOCOL, _LOCAL_IP4, _LOCAL_IP6 = 8, 12, 40, 44

_LOAD32, _STORE32 = 0x61, 0x63
_LOAD_IMMEDIATE64, _PSEUDO_MAP_FD = 0x18, 1
_MOVE, _MOVE_REGISTER, _ADD, _AND = 0xB7, 0xBF, 0x07, 0x57
_JUMP, _JUMP_EQUAL, _JUMP_UNEQUAL = 0x05, 0x15, 0x55
_CALL, _EXIT = 0x85, 0x95
_HELPER_MAP_LOOKUP, _HELPER_SK_RELEASE, _HELPER_SK_ASSIGN = 1, 86, 124
_SK_PASS = 1

_LOG_BYTES = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class RedirectError(OSError):
    """This kernel can't redirect."""


@contextlib.contextmanager
def loopback_redirected(
    namespace: int, ipv4: socket.socket, ipv6: socket.socket | None
) -> Iterator[None]:
    """Within the block TCP connections to 127.0.0.0/8 and ::1 reach these listeners.

    Args:
        namespace: descriptor of the network namespace, in which the listeners are.

    Raises:
        RedirectError: the kernel has no sk_lookup, or does not let us.
    """
    with contextlib.ExitStack() as stack:

        def own(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        sockets = own(
            _bpf("map", _MAP_CREATE, struct.pack("=IIIII", _MAP_TYPE_SOCKMAP, 4, 8, 2, 0))
        )
        for key, listener in enumerate((ipv4, ipv6)):
            if listener is not None:
                _put(sockets, key, listener.fileno())
        program = own(_load(_program(sockets)))
        attributes = struct.pack("=IIII", program, namespace, _ATTACH_SK_LOOKUP, 0)
        own(_bpf("attach", _LINK_CREATE, attributes))
        yield


def _program(sockets: int) -> bytes:
    """By family: is it loopback's address? then assign the socket of that family's key."""
    return _assemble(
        [
            (_MOVE_REGISTER, 6, 1, 0, 0),  # the context is kept in r6
            (_LOAD32, 2, 6, _PROTOCOL, 0),
            (_JUMP_UNEQUAL, 2, 0, "pass", socket.IPPROTO_TCP),
            (_LOAD32, 2, 6, _FAMILY, 0),
            (_JUMP_EQUAL, 2, 0, "ipv4", socket.AF_INET),
            (_JUMP_UNEQUAL, 2, 0, "pass", socket.AF_INET6),
            (_LOAD32, 3, 6, _LOCAL_IP6, 0),
            (_JUMP_UNEQUAL, 3, 0, "pass", 0),
            (_LOAD32, 3, 6, _LOCAL_IP6 + 4, 0),
            (_JUMP_UNEQUAL, 3, 0, "pass", 0),
            (_LOAD32, 3, 6, _LOCAL_IP6 + 8, 0),
            (_JUMP_UNEQUAL, 3, 0, "pass", 0),
            (_LOAD32, 3, 6, _LOCAL_IP6 + 12, 0),
            (_JUMP_UNEQUAL, 3, 0, "pass", _as_loaded(b"\0\0\0\1")),
            (_MOVE, 7, 0, 0, 1),
            (_JUMP, 0, 0, "assign", 0),
            "ipv4",
            (_LOAD32, 3, 6, _LOCAL_IP4, 0),
            (_AND, 3, 0, 0, _as_loaded(b"\xff\0\0\0")),
            (_JUMP_UNEQUAL, 3, 0, "pass", _as_loaded(b"\x7f\0\0\0")),
            (_MOVE, 7, 0, 0, 0),
            "assign",
            (_STORE32, 10, 7, -4, 0),
            (_MOVE_REGISTER, 2, 10, 0, 0),
            (_ADD, 2, 0, 0, -4),
            (_LOAD_IMMEDIATE64, 1, _PSEUDO_MAP_FD, 0, sockets),
            (0, 0, 0, 0, 0),  # the upper half of the immediate
            (_CALL, 0, 0, 0, _HELPER_MAP_LOOKUP),
            (_JUMP_EQUAL, 0, 0, "pass", 0),
            (_MOVE_REGISTER, 7, 0, 0, 0),
            (_MOVE_REGISTER, 1, 6, 0, 0),
            (_MOVE_REGISTER, 2, 7, 0, 0),
            (_MOVE, 3, 0, 0, 0),
            (_CALL, 0, 0, 0, _HELPER_SK_ASSIGN),
            (_MOVE_REGISTER, 1, 7, 0, 0),
            (_CALL, 0, 0, 0, _HELPER_SK_RELEASE),
            "pass",
            (_MOVE, 0, 0, 0, _SK_PASS),
            (_EXIT, 0, 0, 0, 0),
        ]
    )


_Instruction = tuple[int, int, int, "int | str", int]


def _assemble(lines: list[_Instruction | str]) -> bytes:
    """(code, destination, source, offset or label, immediate) each; a string is a label."""
    labels: dict[str, int] = {}
    instructions: list[_Instruction] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(instructions)
        else:
            instructions.append(line)
    code = b""
    for number, (operation, target, source, offset, immediate) in enumerate(instructions):
        jump = labels[offset] - number - 1 if isinstance(offset, str) else offset
        first, second = (target, source) if sys.byteorder == "little" else (source, target)
        code += struct.pack("=BBhi", operation, second << 4 | first, jump, immediate)
    return code


def _as_loaded(network_order: bytes) -> int:
    """What a 32-bit load of these bytes gives."""
    return int.from_bytes(network_order, sys.byteorder)


def _put(sockets: int, key: int, fd: int) -> None:
    keys, values = ctypes.c_uint32(key), ctypes.c_uint64(fd)
    attributes = struct.pack(
        "=IIQQQ", sockets, 0, ctypes.addressof(keys), ctypes.addressof(values), 0
    )
    _bpf("socket", _MAP_UPDATE_ELEM, attributes)


def _load(code: bytes) -> int:
    program = ctypes.create_string_buffer(code, len(code))
    license_name = ctypes.create_string_buffer(b"Apache-2.0")
    complaint = ctypes.create_string_buffer(_LOG_BYTES)
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        *(_PROG_TYPE_SK_LOOKUP, len(code) // 8),
        *(ctypes.addressof(program), ctypes.addressof(license_name)),
        *(1, _LOG_BYTES, ctypes.addressof(complaint)),
        *(0, 0, b"kata_loopback", 0, _ATTACH_SK_LOOKUP),
    )
    return _bpf("program", _PROG_LOAD, attributes)


def _bpf(what: str, command: int, attributes: bytes) -> int:
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise RedirectError(38, f"bpf: not known for {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _libc.syscall(number, command, buffer, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise RedirectError(code, f"bpf {what}: {os.strerror(code)}")
    return int(result)
