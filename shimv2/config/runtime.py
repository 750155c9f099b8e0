# SPDX-License-Identifier: Apache-2.0
"""``[runtime]``: the shim itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keys import SAME_NAME, U32, Section, Support, key

NO, INERT, REFUSED = Support.NO, Support.INERT, Support.REFUSED


class RuntimeConfig(Section):
    """What the shim does around the VM."""

    enable_debug: bool = key(False, "the shim's debug messages", sample=True)
    log_level: str = key(
        "info",
        "how much the shim says",
        choices=("trace", "debug", "info", "warn", "error", "critical"),
        synonyms={"warning": "warn", "fatal": "critical", "panic": "critical"},
    )
    name: str = key("", "runtime component (Rust runtime)", annotation=SAME_NAME, support=INERT)
    hypervisor_name: str = key(
        "", "which [hypervisor.NAME] counts where a file has several", annotation=SAME_NAME
    )
    agent_name: str = key("", "which [agent.NAME] counts", annotation=SAME_NAME, support=INERT)
    internetworking_model: str = key(
        "tcfilter",
        "how the pod's interfaces reach the VM",
        choices=("tcfilter", "macvtap", "none"),
        foreign=("l3forwarding",),
        annotation=SAME_NAME,
        sample=True,
    )
    disable_new_netns: bool = key(
        False,
        "a sandbox may name the host's network namespace, and gets no interface there; only with "
        "model `none`",
        annotation=SAME_NAME,
    )
    dan_conf: str = key(
        "", "directory of directly attached networks (not read here)", support=INERT
    )
    disable_guest_seccomp: bool = key(
        False, "no seccomp inside the guest", annotation=SAME_NAME, sample=True
    )
    guest_selinux_label: str = key("", "SELinux label in the guest", support=NO)
    sandbox_cgroup_only: bool = key(
        False,
        "all of a sandbox's host processes in the pod's cgroup",
        annotation=SAME_NAME,
        sample=True,
    )
    static_sandbox_resource_mgmt: bool = key(
        False, "size the VM at its start and never again", sample=True
    )
    enable_vcpus_pinning: bool = key(
        False, "a host CPU for each vCPU", annotation=SAME_NAME, support=NO
    )
    create_container_timeout: int = key(
        0,
        "limit of CreateContainer; 0 means 60",
        unit="s",
        low=0,
        high=86400,
        annotation=SAME_NAME,
        sample=True,
    )
    sandbox_bind_mounts: tuple[str, ...] = key(
        (), "host paths shown to every sandbox, read-only; `:rw` or `:ro` may follow", support=NO
    )
    disable_guest_empty_dir: bool = key(
        False, "emptyDir volumes lie on the host and are shared (always so here)", support=INERT
    )
    emptydir_mode: str = key(
        "shared-fs",
        "where emptyDir volumes lie",
        choices=("shared-fs",),
        foreign=("block-encrypted", "block-plain"),
        support=INERT,
    )
    kubelet_root_dir: str = key(
        "/var/lib/kubelet", "where the kubelet keeps volumes", sample=True, support=NO
    )
    pod_resource_api_sock: str = key("", "the kubelet's PodResources socket", support=NO)
    vfio_mode: str = key(
        "guest-kernel",
        "how a workload sees passed-through devices",
        choices=("guest-kernel", "vfio"),
        annotation=SAME_NAME,
        support=NO,
    )
    shared_mounts: tuple[Mapping[str, Any], ...] = key(
        (),
        "paths shared between containers",
        annotation=SAME_NAME,
        separator="json",
        support=NO,
    )
    experimental: tuple[str, ...] = key(
        (), "features under trial (there are none)", annotation=SAME_NAME, separator=" ", support=NO
    )
    experimental_force_guest_pull: bool = key(
        False, "pull images inside the guest", annotation=SAME_NAME, support=REFUSED
    )
    enable_tracing: bool = key(False, "OpenTelemetry", support=NO)
    jaeger_endpoint: str = key("", "where traces go", support=INERT)
    jaeger_user: str = key("", "where traces go", support=INERT)
    jaeger_password: str = key("", "where traces go", support=INERT)
    enable_pprof: bool = key(False, "Go profiles", annotation=SAME_NAME, support=NO)
    keep_abnormal: bool = key(False, "keep a sandbox that failed", support=NO)
    use_passfd_io: bool = key(False, "raw streams for stdio (always so here)", support=INERT)
    passfd_listener_port: int = key(
        1027, "vsock port of the stdio streams", low=1, high=U32, support=NO
    )
