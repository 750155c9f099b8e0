# SPDX-License-Identifier: Apache-2.0
"""An OCI document as the guest's agent gets it: protobuf instead of JSON, and without what
only makes sense on the host.

The agent's messages have the fields of the runtime-spec of their time, spelled with other
capitals (``OOMScoreAdj`` for ``oomScoreAdj``); what they lack (``user.umask``,
``seccomp.defaultErrnoRet``, ``resources.unified``, ``linux.timeOffsets``, mounts' id mappings,
``process.scheduler``, ``ioPriority`` …) can't be carried and is reported in `Converted.lost`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from agent.api import oci_pb2
from shimv2.spec import HookKind, Mount, Spec, SpecError, parse_json

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor

_MessageT = TypeVar("_MessageT", bound=Message)

# The one field whose name differs by more than capitals.
_RENAMED = {("grpc.Spec", "ociversion"): "Version"}

_SWAPPINESS = "io.katacontainers.container.resource.swappiness"
_SWAP = "io.katacontainers.container.resource.swap_in_bytes"  # with the memory

# Namespaces that are the VM's own.
_HOST_NAMESPACES = ("network", "cgroup", "time", "pid")

_HOST_ANNOTATIONS = (
    "io.katacontainers.config.agent.policy",
    "io.katacontainers.config.hypervisor.cc_init_data",
)
_HOST_ANNOTATION_PREFIXES = ("cdi.k8s.io/",)

_GUEST_HOOKS = {
    HookKind.CREATE_CONTAINER: "CreateContainer",
    HookKind.START_CONTAINER: "StartContainer",
}

# FieldDescriptorProto's Type and Label, by their numbers in descriptor.proto: the module with
# their names belongs to protobuf's Python half, which a shim goes without (`ttrpc.upb`).
_INT64, _UINT64, _INT32, _BOOL, _STRING, _UINT32 = 3, 4, 5, 8, 9, 13
_REPEATED = 3


class Converted(Generic[_MessageT]):
    """A message and the paths of what it could not carry."""

    __slots__ = ("lost", "message")

    def __init__(self, message: _MessageT, lost: list[str]) -> None:
        self.message = message
        self.lost = lost


def spec_from_json(document: Mapping[str, Any]) -> Converted[oci_pb2.Spec]:
    """The whole document, unchanged.

    Raises:
        SpecError: a value of a wrong type or size.
    """
    return _convert(document, oci_pb2.Spec(), "")


def process_from_json(data: bytes) -> Converted[oci_pb2.Process]:
    """The value of an Any ``types.containerd.io/opencontainers/runtime-spec/1/Process``.

    Raises:
        SpecError: not a process that can be executed.
    """
    converted = _convert(parse_json(data), oci_pb2.Process(), "process")
    process = converted.message
    if not process.Args or not process.Args[0]:
        raise SpecError("process.args: must name a program")
    if not process.Cwd:
        process.Cwd = "/"
    elif not process.Cwd.startswith("/"):
        raise SpecError(f"process.cwd: must be an absolute path, is {process.Cwd!r}")
    for name, texts in (("args", process.Args), ("env", process.Env)):
        for index, text in enumerate(texts):
            if "\0" in text:
                raise SpecError(f"process.{name}[{index}]: has a zero byte in it")
    _without_host_labels(process, keep_selinux=False)
    return converted


def resources_from_json(data: bytes) -> Converted[oci_pb2.LinuxResources]:
    """The value of an Any ``types.containerd.io/opencontainers/runtime-spec/1/LinuxResources``,
    as the host means it (see `guest_resources`).

    Raises:
        SpecError: a value of a wrong type or size.
    """
    return _convert(parse_json(data), oci_pb2.LinuxResources(), "resources")


def resources_of(spec: Spec) -> oci_pb2.LinuxResources:
    """``linux.resources`` as the host means it.

    Raises:
        SpecError: a value of a wrong type or size.
    """
    document = (spec.json.get("linux") or {}).get("resources") or {}
    resources = _convert(document, oci_pb2.LinuxResources(), "linux.resources").message
    swap = _annotated(spec, _SWAP, 1 << 63)
    if swap:
        resources.Memory.Swap = swap
    if _SWAPPINESS in spec.annotations:
        resources.Memory.Swappiness = _annotated(spec, _SWAPPINESS, 100)
    return resources


def _annotated(spec: Spec, name: str, most: int) -> int:
    text = spec.annotations.get(name, "0")
    if not text.isdecimal() or int(text) > most:
        raise SpecError(f"annotations[{name}]: must be between 0 and {most}, is {text[:80]!r}")
    return int(text)


def device_rules(spec: Spec) -> list[oci_pb2.LinuxDeviceCgroup]:
    """``linux.resources.devices``; -1 stands for a number that is not said, and so for all.

    Raises:
        SpecError: a value of a wrong type or size.
    """
    rules = list(resources_of(spec).Devices)
    listed = ((spec.json.get("linux") or {}).get("resources") or {}).get("devices") or []
    for rule, entry in zip(rules, listed, strict=True):
        if entry.get("major") is None:
            rule.Major = -1
        if entry.get("minor") is None:
            rule.Minor = -1
    return rules


def guest_spec(
    spec: Spec,
    *,
    root_path: str,
    mounts: Sequence[Mount],
    seccomp: bool = True,
    selinux: bool = False,
    vfio_in_guest_kernel: bool = True,
    swap: bool = False,
) -> Converted[oci_pb2.Spec]:
    """What CreateContainer sends for `spec`.

    Args:
        root_path: where the guest finds the root file system.
        mounts: the spec's mounts with the guest's sources (`shimv2.volumes`).
        seccomp: the guest supports it and it is not disabled.
        selinux: the guest has a policy; otherwise labels are emptied.
        swap: the guest has swap space as annotations ask for.
        vfio_in_guest_kernel: devices below /dev/vfio are the guest kernel's.
    """
    converted = spec_from_json(spec.json)
    message = converted.message
    message.Root.Path = root_path
    del message.Mounts[:]
    message.Mounts.extend(
        oci_pb2.Mount(
            destination=mount.destination,
            source=mount.source,
            type=mount.type,
            options=mount.options,
        )
        for mount in mounts
    )
    hooks = oci_pb2.Hooks()
    for name in _GUEST_HOOKS.values():
        getattr(hooks, name).extend(getattr(message.Hooks, name))
    message.ClearField("Hooks")
    if any(getattr(hooks, name) for name in _GUEST_HOOKS.values()):
        message.Hooks.CopyFrom(hooks)
    for key in list(message.Annotations):
        if key in _HOST_ANNOTATIONS or key.startswith(_HOST_ANNOTATION_PREFIXES):
            del message.Annotations[key]
    if message.HasField("Process"):
        _without_host_labels(message.Process, keep_selinux=selinux)
    linux = message.Linux
    if not selinux:
        linux.MountLabel = ""
    if not seccomp:
        linux.ClearField("Seccomp")
    guest_resources(linux.Resources)
    if swap and linux.Resources.Memory.Limit > 0 and (total := _annotated(spec, _SWAP, 1 << 63)):
        linux.Resources.Memory.Swap = total
    _replace(
        linux.Namespaces,
        (
            oci_pb2.LinuxNamespace(Type=namespace.Type)
            for namespace in linux.Namespaces
            if namespace.Type not in _HOST_NAMESPACES
        ),
    )
    if vfio_in_guest_kernel:
        _replace(
            linux.Devices,
            (
                device
                for device in linux.Devices
                if not (device.Type == "c" and device.Path.startswith("/dev/vfio/"))
            ),
        )
    return converted


def guest_resources(resources: oci_pb2.LinuxResources) -> None:
    """Take out what the host's cgroups, not the guest's, are there for."""
    for name in ("Devices", "Pids", "BlockIO", "Network"):
        resources.ClearField(name)
    if resources.HasField("CPU"):
        resources.CPU.Cpus = ""
        resources.CPU.Mems = ""


def _without_host_labels(process: oci_pb2.Process, *, keep_selinux: bool) -> None:
    # The guest's kernel has no AppArmor, and profiles are loaded into the host's.
    process.ApparmorProfile = ""
    if not keep_selinux:
        process.SelinuxLabel = ""


def _replace(repeated: Any, values: Iterable[Message]) -> None:
    kept = list(values)
    copies = [type(value).FromString(value.SerializeToString()) for value in kept]
    del repeated[:]
    repeated.extend(copies)


def _convert(document: object, message: _MessageT, path: str) -> Converted[_MessageT]:
    lost: list[str] = []
    _fill(message, document, path, lost)
    return Converted(message, lost)


@functools.cache
def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """Field by the lower-case form of its JSON key."""
    fields = {field.name.lower(): field for field in descriptor.fields}
    for (name, key), renamed in _RENAMED.items():
        if name == descriptor.full_name:
            fields[key] = fields.pop(renamed.lower())
    return fields


def _fill(message: Message, value: object, path: str, lost: list[str]) -> None:
    if not isinstance(value, dict):
        raise _bad(path or "config.json", value, "an object")
    fields = _fields(message.DESCRIPTOR)
    for key, item in value.items():
        if item is None:  # as Go reads it
            continue
        field = fields.get(key.lower())
        where = f"{path}.{key}" if path else key
        if field is None:
            lost.append(where)
        elif _is_map(field):
            _fill_map(getattr(message, field.name), item, where)
        elif _is_repeated(field):
            _fill_list(getattr(message, field.name), field, item, where, lost)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            child.SetInParent()
            _fill(child, item, where, lost)
        else:
            setattr(message, field.name, _scalar(field, item, where))


def _fill_map(target: Any, value: object, path: str) -> None:
    if not isinstance(value, dict):
        raise _bad(path, value, "an object")
    for key, item in value.items():
        if not isinstance(item, str):
            raise _bad(f"{path}[{key}]", item, "a string")
        target[key] = item


def _fill_list(
    target: Any, field: FieldDescriptor, value: object, path: str, lost: list[str]
) -> None:
    if not isinstance(value, list):
        raise _bad(path, value, "a list")
    for index, item in enumerate(value):
        where = f"{path}[{index}]"
        if field.message_type is not None:
            _fill(target.add(), item, where, lost)
        else:
            target.append(_scalar(field, item, where))


def _scalar(field: FieldDescriptor, value: object, path: str) -> object:
    if field.type == _STRING:
        if not isinstance(value, str):
            raise _bad(path, value, "a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _bad(path, value, "valid Unicode") from None
        return value
    if field.type == _BOOL:
        if not isinstance(value, bool):
            raise _bad(path, value, "a bool")
        return value
    if field.type not in (_INT32, _INT64, _UINT32, _UINT64):
        raise SpecError(f"{path}: a field of type {field.type} is not expected in a spec")
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(path, value, "a whole number")
    bits = 32 if field.type in (_INT32, _UINT32) else 64
    signed = field.type in (_INT32, _INT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if not low <= value <= high:
        raise _bad(path, value, f"between {low} and {high}")
    return value


def _is_map(field: FieldDescriptor) -> bool:
    # `map_entry` is the only option of a message here, and GetOptions would load descriptor_pb2.
    kind = field.message_type
    return kind is not None and kind.has_options


def _is_repeated(field: FieldDescriptor) -> bool:
    # `is_repeated` is new in protobuf 6, where `label` starts to warn.
    repeated = getattr(field, "is_repeated", None)
    if repeated is None:
        repeated = getattr(field, "label", None) == _REPEATED
    return bool(repeated)


def _bad(path: str, value: object, expected: str) -> SpecError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:80] + "…"
    return SpecError(f"{path}: must be {expected}, is {shown}")
