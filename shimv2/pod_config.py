# SPDX-License-Identifier: Apache-2.0
"""What CreateSandbox says of a sandbox that has no container: CRI's config of the pod."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shimv2 import spec as oci
from shimv2.api import cri_pb2
from shimv2.resources import pod_annotations

# containerd's annotations, and CRI-O's.
_POD_ANNOTATIONS = {
    "name": ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
    "namespace": ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
    "uid": ("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
}
_HOST_RESOLV_CONF = Path("/etc/resolv.conf")


def sandbox_spec(bundle: Path, request: Any) -> oci.Spec:
    """The sandbox as an OCI spec; config.json may be absent or nearly empty.

    Args:
        request: the CreateSandboxRequest; what it says goes before config.json.

    Raises:
        SpecError: config.json can't be used.
    """
    try:
        document = dict(oci.load(bundle).json)
    except FileNotFoundError:
        document = {}
    document["annotations"] = {
        **(document.get("annotations") or {}),
        **dict(request.annotations),
    }
    linux = dict(document.get("linux") or {})
    pod = _pod(request)
    if pod is not None:
        if pod.linux.HasField("resources"):
            document["annotations"] |= pod_annotations(pod.linux.resources)
        document["annotations"] |= {
            _POD_ANNOTATIONS[what][0]: getattr(pod.metadata, what) for what in _POD_ANNOTATIONS
        }
        document["hostname"] = pod.hostname or document.get("hostname") or ""
        if pod.linux.cgroup_parent:
            linux["cgroupsPath"] = _cgroups_path(pod.linux.cgroup_parent, request.sandbox_id)
        linux["sysctl"] = {**(linux.get("sysctl") or {}), **dict(pod.linux.sysctls)}
    if request.netns_path:
        others = [n for n in linux.get("namespaces") or [] if n.get("type") != "network"]
        linux["namespaces"] = [*others, {"type": "network", "path": request.netns_path}]
    document["linux"] = linux
    return oci.Spec(document, bundle)


def pod_of(annotations: Mapping[str, str]) -> dict[str, str]:
    """What Kubernetes calls a pod: ``name``, ``namespace``, ``uid``, as far as it is known."""
    return {
        what: annotations[key]
        for what, keys in _POD_ANNOTATIONS.items()
        for key in keys
        if annotations.get(key)
    }


def resolver_lines(request: Any) -> list[str]:
    """The pod's resolv.conf, as containerd makes it for a sandbox with a container: what CRI
    says, or else the host's."""
    pod = _pod(request)
    if pod is None:
        return []
    dns = pod.dns_config
    if not (dns.servers or dns.searches or dns.options):
        try:
            return _HOST_RESOLV_CONF.read_text(errors="replace").splitlines()
        except OSError:
            return []
    lines = []
    if dns.searches:
        lines.append("search " + " ".join(dns.searches))
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return lines


def _pod(request: Any) -> cri_pb2.PodSandboxConfig | None:
    # containerd's type URLs are bare names, which Any.Unpack() does not take.
    if request.options.type_url.rpartition("/")[2] != cri_pb2.PodSandboxConfig.DESCRIPTOR.full_name:
        return None
    return cri_pb2.PodSandboxConfig.FromString(request.options.value)


def _cgroups_path(parent: str, sandbox_id: str) -> str:
    """As containerd's CRI plugin makes it for a sandbox that has a container."""
    if parent.endswith(".slice"):
        return f"{os.path.basename(parent)}:cri-containerd:{sandbox_id}"
    return f"{parent}/{sandbox_id}"
