# SPDX-License-Identifier: Apache-2.0
"""From the host's grpc.Spec to the config.json that crun reads.

Names differ in their capitals only, with a few exceptions.  proto3 has no "absent", so a
field with its zero value is left out, unless runtime-spec requires it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.api import oci_pb2

OCI_VERSION = "1.0.2"  # what every crun takes; the host's may be newer than this crun

_RENAMED = {"Version": "ociVersion", "Pagesize": "pageSize", "errnoret": "errnoRet"}

# Message → fields that are written even if zero.
_REQUIRED = {
    "User": ("UID", "GID"),
    "Root": ("Path",),
    "POSIXRlimit": ("Hard", "Soft"),
    "LinuxIDMapping": ("HostID", "ContainerID", "Size"),
    "LinuxDevice": ("Major", "Minor"),
    "LinuxDeviceCgroup": ("Allow", "Major", "Minor"),  # -1 is for all, 0 is a number
    "LinuxThrottleDevice": ("Major", "Minor", "Rate"),
    "LinuxSeccompArg": ("Index", "Value", "Op"),
    "LinuxHugepageLimit": ("Limit",),
    "Box": ("Height", "Width"),
}
_SKIPPED = {"Username", "Solaris", "Windows"}

# Sysctls of namespaces that the whole VM shares: the agent sets them, crun would refuse.
_SHARED_SYSCTLS = ("net.", "fs.mqueue.", "kernel.msg", "kernel.sem", "kernel.shm")
_SHARED_SYSCTL_NAMES = ("kernel.hostname", "kernel.domainname")

_APPARMOR = "/sys/module/apparmor"
_SELINUX = "/sys/fs/selinux/enforce"
_HOOK_KINDS = ("prestart", "poststart", "poststop")

_names: dict[str, str] = {}


def to_json(message: Any) -> dict[str, Any]:
    """Any message of oci.proto as the JSON object of runtime-spec."""
    out: dict[str, Any] = {}
    for field, value in message.ListFields():
        name = field.name
        if name in _SKIPPED:
            continue
        kind = field.message_type
        if kind is not None and hasattr(value, "items"):  # a map
            out[_json_name(name)] = dict(value)
        elif field.is_repeated:
            out[_json_name(name)] = [to_json(v) for v in value] if kind else list(value)
        else:
            out[_json_name(name)] = to_json(value) if kind else value
    for name in _REQUIRED.get(message.DESCRIPTOR.name, ()):
        out.setdefault(_json_name(name), getattr(message, name))
    return out


def process_spec(process: oci_pb2.Process) -> dict[str, Any]:
    """A process for crun, without labels of security modules that this kernel doesn't have."""
    document = to_json(process)
    if not os.path.exists(_APPARMOR):
        document.pop("apparmorProfile", None)
    if not os.path.exists(_SELINUX):
        document.pop("selinuxLabel", None)
    return document


def add_hooks(document: dict[str, Any], directory: str) -> None:
    """Append the image's own hooks: executables in DIRECTORY/{prestart,poststart,poststop}."""
    for kind in _HOOK_KINDS:
        try:
            names = sorted(os.listdir(f"{directory}/{kind}"))
        except OSError:
            continue
        paths = [f"{directory}/{kind}/{name}" for name in names]
        found = [
            {"path": path, "args": [path]}
            for path in paths
            if os.path.isfile(path) and os.access(path, os.X_OK)
        ]
        if found:
            document.setdefault("hooks", {}).setdefault(kind, []).extend(found)


def runtime_spec(spec: oci_pb2.Spec, pid_namespace: str | None) -> dict[str, Any]:
    """config.json of a container in the sandbox.

    Args:
        pid_namespace: path of one to join, or None for one of its own.
    """
    document = to_json(spec)
    document["process"] = process_spec(spec.Process)
    document["ociVersion"] = OCI_VERSION
    # The network, uts and ipc namespaces are the VM's own and shared by all its containers.
    document.pop("hostname", None)
    linux = document.setdefault("linux", {})
    linux["namespaces"] = [
        entry
        for entry in linux.get("namespaces", ())
        if entry.get("type") not in ("network", "uts", "ipc", "pid")
    ]
    pid: dict[str, str] = {"type": "pid"}
    if pid_namespace is not None:
        pid["path"] = pid_namespace
    linux["namespaces"].append(pid)
    linux["cgroupsPath"] = cgroup_path(spec.Linux.CgroupsPath)
    linux["sysctl"] = {
        name: value for name, value in linux.get("sysctl", {}).items() if not _is_shared(name)
    }
    resources = linux.get("resources")
    if resources is not None:
        resources.pop("network", None)  # of version 1's controllers for traffic marks
    linux.pop("intelRdt", None)
    if not os.path.exists(_SELINUX):
        linux.pop("mountLabel", None)
    return document


def shared_sysctls(spec: oci_pb2.Spec) -> dict[str, str]:
    """The sysctls that the agent itself has to set."""
    return {name: value for name, value in spec.Linux.Sysctl.items() if _is_shared(name)}


def cgroup_path(text: str) -> str:
    """A cgroupfs path; `slice:prefix:name` of systemd's driver becomes `/slice/prefix-name.scope`.

    The parts of a slice's name stand for its parents: a-b.slice lies in a.slice.
    """
    parts = text.split(":")
    if len(parts) != 3:
        return text if text.startswith("/") or not text else f"/{text}"
    slice_name, prefix, name = parts
    directories = []
    stem = slice_name.removesuffix(".slice")
    if stem and stem != "-":
        words = stem.split("-")
        directories = ["-".join(words[: n + 1]) + ".slice" for n in range(len(words))]
    leaf = f"{prefix}-{name}" if prefix else name
    return "/" + "/".join([*directories, f"{leaf}.scope"])


def _is_shared(name: str) -> bool:
    return name.startswith(_SHARED_SYSCTLS) or name in _SHARED_SYSCTL_NAMES


def _json_name(name: str) -> str:
    """`OOMScoreAdj` → `oomScoreAdj`, `UID` → `uid`, `Env` → `env`."""
    known = _names.get(name)
    if known is None:
        known = _names[name] = _RENAMED.get(name) or _lower_start(name)
    return known


def _lower_start(name: str) -> str:
    count = 0
    while count < len(name) and (name[count].isupper() or (count and name[count].isdigit())):
        count += 1
    if 1 < count < len(name):
        count -= 1  # the last capital begins the next word
    return name[:count].lower() + name[count:]
