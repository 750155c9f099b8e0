# SPDX-License-Identifier: Apache-2.0
"""What containerd and a shim's ``start`` and ``delete`` say to each other, without protobuf.

Both have to answer fast, so the small messages are read and written by hand (protobuf costs
more to import than all the rest).  Field numbers: ``shimv2/api/bootstrap.proto`` and
``task_v2.proto``.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKET_DIR = "/run/containerd/s"
_MAX_STDIN = 10 << 20  # containerd writes options, never more than this

MOUNT_TYPES = ("erofs",)
"""Left to us instead of being mounted by containerd's mount manager (2.2 and later)."""
MOUNT_TRANSFORMS = ("format", "mkdir")
"""Prefixes of mount types that we apply ourselves; ``mkfs`` containerd does before."""

# The options of runtimes like ours; the second is what containerd 1.4 called it.
RUNTIME_OPTIONS_TYPES = ("runtimeoptions.v1.Options", "cri-containerd.runtimeoptions.v1.Options")


class Params:
    """What came on stdin of ``start``.

    Attributes:
        rich: containerd sent BootstrapParams, so it understands a protobuf answer.
        options: serialized ``google.protobuf.Any`` with the runtime options, b"" if none.
        ttrpc_address, grpc_address, socket_dir: "" where not said.
        debug: containerd logs at debug level or finer.
    """

    __slots__ = ("debug", "grpc_address", "options", "rich", "socket_dir", "ttrpc_address")

    def __init__(self) -> None:
        self.rich = False
        self.options = b""
        self.ttrpc_address = ""
        self.grpc_address = ""
        self.socket_dir = ""
        self.debug = False


def read_stdin(fd: int = 0) -> bytes:
    """All of stdin up to its end; at most 10 MiB.

    Raises:
        ValueError: more than that.
    """
    if os.isatty(fd):
        return b""
    chunks: list[bytes] = []
    size = 0
    while True:
        try:
            chunk = os.read(fd, 65536)
        except OSError:  # started with stdin closed
            break
        if not chunk:
            break
        size += len(chunk)
        if size > _MAX_STDIN:
            raise ValueError("more than 10 MiB on stdin")
        chunks.append(chunk)
    return b"".join(chunks)


def parse_params(data: bytes, instance_id: str, namespace: str) -> Params:
    """BootstrapParams if its id and namespace are ours, else the bytes are an Any.

    The two can't be told apart otherwise: MAX_SHIM_VERSION is 2 in every containerd.
    """
    params = Params()
    if not data:
        return params
    try:
        fields = list(_fields(data))
    except ValueError:
        params.options = data
        return params
    text = {number: value for number, value in fields if isinstance(value, bytes)}
    if text.get(1) != instance_id.encode() or text.get(2) != namespace.encode():
        params.options = data
        return params
    params.rich = True
    params.ttrpc_address = text.get(5, b"").decode(errors="replace")
    params.grpc_address = text.get(6, b"").decode(errors="replace")
    params.socket_dir = text.get(9, b"").decode(errors="replace")
    for number, value in fields:
        if number == 3 and isinstance(value, int):
            params.debug = _signed32(value) <= -4  # LOG_LEVEL_DEBUG, _TRACE
        if number == 8 and isinstance(value, bytes):
            extension = dict(_fields(value))
            packed = extension.get(1)
            if isinstance(packed, bytes) and _any_type(packed) in RUNTIME_OPTIONS_TYPES:
                params.options = packed
    return params


def config_path_of(options: bytes) -> tuple[str, bool]:
    """The configuration file that serialized runtime options name.

    Returns:
        (path, known): path "" means the default lookup; known is False for options of a
        type we don't read (runc's), which is no error.
    """
    if not options:
        return "", True
    try:
        packed = dict(_fields(options))
        kind, value = packed.get(1, b""), packed.get(2, b"")
        if not isinstance(kind, bytes) or not isinstance(value, bytes):
            return "", False
        if kind.decode(errors="replace").rsplit("/", 1)[-1] not in RUNTIME_OPTIONS_TYPES:
            return "", False
        path = dict(_fields(value)).get(2, b"")
    except ValueError:
        return "", False
    return (path.decode() if isinstance(path, bytes) else ""), True


def answer(address: str, *, rich: bool, json_answer: bool) -> bytes:
    """What ``start`` prints: the plain address unless more is known to be understood."""
    if rich:
        return b"".join(
            (
                b"\x08\x03",  # 1 version = 3
                b"\x12" + _varint(len(address)) + address.encode(),  # 2 address
                b"\x1a\x05ttrpc",  # 3 protocol
                _field(6, _field(1, _mount_capabilities())),  # 6 extensions: 1 value
            )
        )
    if json_answer:
        return b'{"version":3,"address":"%s","protocol":"ttrpc"}' % address.encode()
    return address.encode()


def _mount_capabilities() -> bytes:
    """An Any with containerd.types.MountCapabilities, which spares containerd 2.4 a call of -info."""
    value = b"".join(_field(1, name.encode()) for name in MOUNT_TYPES)
    value += b"".join(_field(2, name.encode()) for name in MOUNT_TRANSFORMS)
    return _field(1, b"type.googleapis.com/containerd.types.MountCapabilities") + _field(2, value)


def delete_response(pid: int, exit_status: int, now: int) -> bytes:
    """A serialized containerd.task.v2.DeleteResponse.

    Args:
        now: nanoseconds since the epoch.
    """
    seconds, nanos = divmod(now, 1_000_000_000)
    stamp = b"\x08" + _varint(seconds) + b"\x10" + _varint(nanos)  # 1 seconds, 2 nanos
    return b"".join(
        (
            b"\x08" + _varint(pid),  # 1 pid
            b"\x10" + _varint(exit_status),  # 2 exit_status
            b"\x1a" + _varint(len(stamp)) + stamp,  # 3 exited_at
        )
    )


def socket_path(grpc_address: str, namespace: str, group: str, directory: str = "") -> str:
    """Where the shim of a group listens: the same for every container of a pod."""
    key = os.path.join(grpc_address, namespace, group)
    return os.path.join(directory or SOCKET_DIR, _sha256_hex(key.encode()))


def _sha256_hex(data: bytes) -> str:
    # hashlib loads OpenSSL, which takes longer than all the rest of `start`.
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # Python 3.11
    except ImportError:
        from _sha2 import sha256  # type: ignore[import-not-found]  # 3.12 and later
    digest: str = sha256(data).hexdigest()
    return digest


def _any_type(packed: bytes) -> str:
    kind = dict(_fields(packed)).get(1, b"")
    return kind.decode(errors="replace").rsplit("/", 1)[-1] if isinstance(kind, bytes) else ""


def _signed32(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message; raises ValueError if it is none."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire_type == 0:
            value, position = _read_varint(data, position)
            yield number, value
        elif wire_type == 2:
            length, position = _read_varint(data, position)
            if position + length > len(data):
                raise ValueError("truncated field")
            yield number, data[position : position + length]
            position += length
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
            if position > len(data):
                raise ValueError("truncated field")
        else:
            raise ValueError(f"wire type {wire_type}")


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("bad varint")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
