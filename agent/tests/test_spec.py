# SPDX-License-Identifier: Apache-2.0
"""grpc.Spec to config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent import spec as specs
from agent.api import oci_pb2


def test_names_are_runtime_specs() -> None:
    spec = oci_pb2.Spec(Version="1.3.0", Hostname="h")
    process = spec.Process
    process.Args.extend(["a", "b"])
    process.User.UID, process.User.GID = 5, 0
    process.User.AdditionalGids.extend([7])
    process.NoNewPrivileges = True
    process.OOMScoreAdj = -3
    process.ConsoleSize.Height = 25
    process.Rlimits.add(Type="RLIMIT_CORE", Hard=0, Soft=0)
    process.Capabilities.Bounding.append("CAP_KILL")
    spec.Root.Path, spec.Root.Readonly = "/r", True
    spec.Mounts.add(destination="/proc", source="proc", type="proc", options=["ro"])
    spec.Annotations["k"] = "v"
    linux = spec.Linux
    linux.UIDMappings.add(HostID=1, ContainerID=0, Size=9)
    linux.MaskedPaths.append("/m")
    linux.Resources.Memory.Limit = 1 << 20
    linux.Resources.Memory.DisableOOMKiller = True
    linux.Resources.CPU.RealtimePeriod = 4
    linux.Resources.HugepageLimits.add(Pagesize="2MB")
    linux.Resources.BlockIO.ThrottleReadIOPSDevice.add(Major=8, Rate=5)
    linux.Devices.add(Path="/dev/x", Type="c", Major=0, Minor=3, FileMode=0o600)
    linux.Resources.Devices.add(Access="rwm", Type="c", Major=5, Minor=0)
    call = linux.Seccomp.Syscalls.add(Names=["mkdir"], Action="SCMP_ACT_ERRNO", errnoret=0)
    call.Args.add(Index=0, Value=0, Op="SCMP_CMP_EQ")
    document = specs.to_json(spec)
    assert document["process"] == {
        "args": ["a", "b"],
        "user": {"uid": 5, "gid": 0, "additionalGids": [7]},
        "noNewPrivileges": True,
        "oomScoreAdj": -3,
        "consoleSize": {"height": 25, "width": 0},
        "rlimits": [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
        "capabilities": {"bounding": ["CAP_KILL"]},
    }
    assert document["root"] == {"path": "/r", "readonly": True}
    assert document["annotations"] == {"k": "v"}
    assert document["linux"] == {
        "uidMappings": [{"hostID": 1, "containerID": 0, "size": 9}],
        "maskedPaths": ["/m"],
        "resources": {
            "memory": {"limit": 1 << 20, "disableOOMKiller": True},
            "cpu": {"realtimePeriod": 4},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "blockIO": {"throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 5}]},
            "devices": [{"allow": False, "access": "rwm", "type": "c", "major": 5, "minor": 0}],
        },
        "devices": [{"path": "/dev/x", "type": "c", "major": 0, "minor": 3, "fileMode": 0o600}],
        "seccomp": {
            "syscalls": [
                {
                    "names": ["mkdir"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 0,
                    "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}],
                }
            ]
        },
    }


def test_what_the_sandbox_changes() -> None:
    spec = oci_pb2.Spec(Version="1.3.0", Hostname="h")
    for kind in ("pid", "network", "ipc", "uts", "mount"):
        spec.Linux.Namespaces.add(Type=kind)
    spec.Linux.Sysctl["net.core.somaxconn"] = "1"
    spec.Linux.Sysctl["user.max_user_namespaces"] = "2"
    document = specs.runtime_spec(spec, "/proc/7/ns/pid")
    assert document["ociVersion"] == specs.OCI_VERSION
    assert "hostname" not in document
    assert document["linux"]["namespaces"] == [
        {"type": "mount"},
        {"type": "pid", "path": "/proc/7/ns/pid"},
    ]
    assert document["linux"]["sysctl"] == {"user.max_user_namespaces": "2"}
    assert specs.shared_sysctls(spec) == {"net.core.somaxconn": "1"}
    own = specs.runtime_spec(spec, None)
    assert {"type": "pid"} in own["linux"]["namespaces"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", ""),
        ("/default/c1", "/default/c1"),
        ("k8s/c1", "/k8s/c1"),
        ("system.slice:docker:c1", "/system.slice/docker-c1.scope"),
        ("kubepods-pod1.slice:cri:c1", "/kubepods.slice/kubepods-pod1.slice/cri-c1.scope"),
        ("a-b-c.slice::x", "/a.slice/a-b.slice/a-b-c.slice/x.scope"),
        ("-.slice:p:x", "/p-x.scope"),
        (":p:x", "/p-x.scope"),
    ],
)
def test_cgroup_paths(text: str, path: str) -> None:
    assert specs.cgroup_path(text) == path


def test_labels_of_absent_security_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = oci_pb2.Process(ApparmorProfile="docker-default", SelinuxLabel="x_t")
    monkeypatch.setattr(specs, "_APPARMOR", str(tmp_path))
    monkeypatch.setattr(specs, "_SELINUX", str(tmp_path / "no"))
    assert specs.process_spec(process) == {"apparmorProfile": "docker-default"}
    monkeypatch.setattr(specs, "_APPARMOR", str(tmp_path / "no"))
    assert specs.process_spec(process) == {}


def test_hooks_of_the_image(tmp_path: Path) -> None:
    for name, mode in (("b", 0o755), ("a", 0o755), ("text", 0o644)):
        file = tmp_path / "prestart" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        file.chmod(mode)
    document: dict[str, Any] = {"hooks": {"prestart": [{"path": "/own"}]}}
    specs.add_hooks(document, str(tmp_path))
    assert [hook["path"] for hook in document["hooks"]["prestart"]] == [
        "/own",
        f"{tmp_path}/prestart/a",
        f"{tmp_path}/prestart/b",
    ]
    assert set(document["hooks"]) == {"prestart"}
