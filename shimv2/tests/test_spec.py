# SPDX-License-Identifier: Apache-2.0
"""config.json: what is read of it, what is refused, and what the guest gets."""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from agent.api import oci_pb2
from shimv2 import guest_spec
from shimv2.spec import ContainerKind, HookKind, Spec, SpecError, load

FULL: dict[str, Any] = {
    "ociVersion": "1.1.0",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [1, 2], "umask": 18},
        "args": ["sh", "-c", "true"],
        "env": ["PATH=/bin", "EMPTY="],
        "cwd": "/work",
        "capabilities": {
            "bounding": ["CAP_KILL"],
            "effective": ["CAP_CHOWN"],
            "inheritable": ["CAP_FOWNER"],
            "permitted": ["CAP_SETUID"],
            "ambient": ["CAP_SETGID"],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 18446744073709551615, "soft": 1024}],
        "noNewPrivileges": True,
        "apparmorProfile": "docker-default",
        "oomScoreAdj": -998,
        "selinuxLabel": "system_u:system_r:container_t:s0",
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "web",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": None},
        {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]},
    ],
    "hooks": {
        "prestart": [{"path": "/bin/a", "args": ["a", "x"], "env": ["A=1"], "timeout": 5}],
        "createRuntime": [{"path": "/bin/b"}],
        "createContainer": [{"path": "/bin/c"}],
        "startContainer": [{"path": "/bin/d"}],
        "poststart": [{"path": "/bin/e"}],
        "poststop": [{"path": "/bin/f"}],
    },
    "annotations": {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": "pod",
        "io.katacontainers.config.agent.policy": "secret",
        "cdi.k8s.io/vendor": "x",
    },
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 20}],
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "resources": {
            "devices": [{"allow": False, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
            "memory": {
                "limit": 1 << 30,
                "reservation": 1,
                "swap": -1,
                "kernel": 2,
                "kernelTCP": 3,
                "swappiness": 60,
                "disableOOMKiller": True,
            },
            "cpu": {
                "shares": 1024,
                "quota": -1,
                "period": 100000,
                "realtimeRuntime": 1,
                "realtimePeriod": 2,
                "cpus": "0-3",
                "mems": "0",
            },
            "pids": {"limit": 100},
            "blockIO": {
                "weight": 10,
                "leafWeight": 11,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 5, "leafWeight": 6}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 2}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 3}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 4}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
            "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 5}]},
            "unified": {"memory.high": "1"},
        },
        "cgroupsPath": "/kubepods/pod1/web",
        "namespaces": [
            {"type": "pid", "path": "/proc/1/ns/pid"},
            {"type": "network", "path": "/run/netns/pod"},
            {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "uts"},
            {"type": "mount"},
            {"type": "cgroup"},
            {"type": "time"},
        ],
        "devices": [
            {
                "path": "/dev/fuse",
                "type": "c",
                "major": 10,
                "minor": 229,
                "fileMode": 438,
                "uid": 1,
                "gid": 2,
            },
            {"path": "/dev/vfio/12", "type": "c", "major": 240, "minor": 0},
        ],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 8, "valueTwo": 9, "op": "SCMP_CMP_EQ"}],
                },
            ],
        },
        "rootfsPropagation": "rslave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "system_u:object_r:container_file_t:s0",
        "intelRdt": {"l3CacheSchema": "L3:0=f"},
    },
}
LOST = [
    "process.user.umask",
    "linux.resources.unified",
    "linux.seccomp.defaultErrnoRet",
]


def changed(path: str, value: object) -> dict[str, Any]:
    document = copy.deepcopy(FULL)
    *parents, last = path.split(".")
    node: Any = document
    for key in parents:
        node = node[int(key)] if key.isdigit() else node[key]
    if value is ...:
        del node[last]
    elif isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    return document


def test_what_the_shim_reads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FULL))
    spec = load(tmp_path)
    spec.check_container()
    assert spec.kind is ContainerKind.MEMBER
    assert spec.sandbox_id == spec.group == "pod"
    assert spec.rootfs == tmp_path / "rootfs"
    assert spec.netns == "/run/netns/pod"
    assert spec.sandbox_pidns
    assert spec.terminal
    assert spec.args == ["sh", "-c", "true"]
    assert spec.cgroups_path == "/kubepods/pod1/web"
    assert spec.mounts[0].options == []
    assert [mount.is_bind for mount in spec.mounts] == [False, True]
    assert spec.mounts[1].readonly
    assert spec.mount_at("/data") is spec.mounts[1]
    hook = spec.hooks[HookKind.PRESTART][0]
    assert (hook.path, hook.args, hook.env, hook.timeout) == ("/bin/a", ["a", "x"], ["A=1"], 5)
    assert spec.hooks[HookKind.CREATE_RUNTIME][0].args == ["/bin/b"]


@pytest.mark.parametrize(
    ("annotations", "kind", "group"),
    [
        ({}, ContainerKind.SINGLE, ""),
        ({"io.containerd.runc.v2.group": "g"}, ContainerKind.SINGLE, "g"),
        (
            {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "s",
            },
            ContainerKind.SANDBOX,
            "s",
        ),
        (
            {
                "io.kubernetes.cri-o.ContainerType": "container",
                "io.kubernetes.cri-o.SandboxID": "s",
            },
            ContainerKind.MEMBER,
            "s",
        ),
    ],
)
def test_kinds(annotations: dict[str, str], kind: ContainerKind, group: str) -> None:
    spec = Spec({"ociVersion": "1.0.2", "annotations": annotations}, Path("/b"))
    assert (spec.kind, spec.group) == (kind, group)


@pytest.mark.parametrize(
    ("namespaces", "netns"),
    [
        ([], None),
        ([{"type": "network"}], ""),
        ([{"type": "network", "path": "/proc/0/ns/net"}], ""),
        ([{"type": "network", "path": "/run/netns/a"}], "/run/netns/a"),
    ],
)
def test_network_namespace(namespaces: list[dict[str, str]], netns: str | None) -> None:
    assert Spec({"linux": {"namespaces": namespaces}}, Path("/b")).netns == netns


def test_a_sandbox_needs_nothing_but_a_version() -> None:
    spec = Spec({"ociVersion": "1.2.0", "annotations": {"a": "b"}}, Path("/b"))
    assert spec.rootfs is None
    with pytest.raises(SpecError, match="process: missing"):
        spec.check_container()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{", "line 1"),
        (b'{"a": 1,\n  "b" 2}', "line 2, column 7"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "config.json: must be an object, is []"),
        (b"[" * 100000, "not JSON"),
        (b'"' + b"x" * 300 + b'"', "must be an object"),
    ],
)
def test_broken_json(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(SpecError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_file_is_not_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SpecError, match="directory"):
        load(tmp_path)


def test_an_absurdly_large_file(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SpecError, match="more than 16 MiB"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("ociVersion", 1, "ociVersion"),
        ("ociVersion", "2.0.0", "ociVersion"),
        ("process", [], "process"),
        ("process.args", [], "process.args"),
        ("process.args", ..., "process.args"),
        ("process.args", "sh", "process.args"),
        ("process.args.1", 5, "process.args[1]"),
        ("process.args.0", "a\0b", "process.args[0]"),
        ("process.env.0", None, "process.env[0]"),
        ("process.cwd", "work", "process.cwd"),
        ("process.cwd", "", "process.cwd"),
        ("process.terminal", "yes", "process.terminal"),
        ("root", ..., "root"),
        ("root.path", ..., "root.path"),
        ("root.path", "", "root.path"),
        ("root.path", "../../etc", "root.path"),
        ("root.path", 5, "root.path"),
        ("mounts", {}, "mounts"),
        ("mounts.1.destination", "data", "mounts[1].destination"),
        ("mounts.1.destination", ..., "mounts[1].destination"),
        ("mounts.1.options.0", 5, "mounts[1].options[0]"),
        ("mounts.1", "x", "mounts[1]"),
        ("hooks.prestart.0.path", "a", "hooks.prestart[0].path"),
        ("hooks.prestart.0.timeout", 0, "hooks.prestart[0].timeout"),
        ("hooks.prestart.0.timeout", True, "hooks.prestart[0].timeout"),
        ("annotations.a", 5, "annotations[a]"),
        ("linux.cgroupsPath", "/a/../../b", "linux.cgroupsPath"),
        ("linux.namespaces.0.path", "rel", "linux.namespaces[0].path"),
        ("linux.namespaces.0.type", ..., "linux.namespaces[0].type"),
        ("linux.namespaces", 7, "linux.namespaces"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: object, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Spec(changed(path, value), Path("/b")).check_container()
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("process.user.uid", -1, "process.user.uid"),
        ("process.user.uid", 1 << 32, "process.user.uid"),
        ("process.user.additionalGids.0", "x", "process.user.additionalGids[0]"),
        ("process.rlimits.0.hard", 1 << 64, "process.rlimits[0].hard"),
        ("process.oomScoreAdj", 1.5, "process.oomScoreAdj"),
        ("process.capabilities", [], "process.capabilities"),
        ("process.noNewPrivileges", 1, "process.noNewPrivileges"),
        ("linux.resources.memory.limit", "1G", "linux.resources.memory.limit"),
        ("linux.seccomp.syscalls.0.errnoRet", "x", "linux.seccomp.syscalls[0].errnoRet"),
        ("linux.sysctl", [], "linux.sysctl"),
        ("linux.devices.0", 5, "linux.devices[0]"),
    ],
)
def test_what_cannot_be_converted_is_named(path: str, value: object, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        guest_spec.spec_from_json(changed(path, value))
    assert str(caught.value).startswith(f"{field}: must be ")


def to_json(message: Any) -> Any:
    """Back to JSON with the runtime-spec's spelling in lower case, empty values left out."""
    out: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type and field.message_type.GetOptions().map_entry:
            out[field.name.lower()] = dict(value)
        elif field.message_type and hasattr(value, "add"):
            out[field.name.lower()] = [to_json(item) for item in value]
        elif field.message_type:
            out[field.name.lower()] = to_json(value)
        elif hasattr(value, "append"):
            out[field.name.lower()] = list(value)
        else:
            out[field.name.lower()] = value
    return out


def lowered(value: Any, path: str = "") -> Any:
    """The document as `to_json` shows it."""
    if isinstance(value, dict):
        if path in ("sysctl", "annotations"):
            return value
        out = {}
        for key, item in value.items():
            name = {"ociversion": "version"}.get(key.lower(), key.lower())
            low = lowered(item, name)
            if key in ("umask", "unified", "defaultErrnoRet") or item is None:
                continue
            if low in ("", 0, False) and key != "errnoRet":
                continue
            out[name] = low
        return out
    return [lowered(item) for item in value] if isinstance(value, list) else value


def test_every_field_arrives() -> None:
    converted = guest_spec.spec_from_json(FULL)
    assert to_json(converted.message) == lowered(FULL)
    assert sorted(converted.lost) == sorted(LOST)


def test_errno_ret_zero_is_not_absent() -> None:
    clone, personality = guest_spec.spec_from_json(FULL).message.Linux.Seccomp.Syscalls
    assert clone.WhichOneof("ErrnoRet") == "errnoret"
    assert personality.WhichOneof("ErrnoRet") is None


def test_what_the_guest_gets() -> None:
    spec = Spec(FULL, Path("/b"))
    message = guest_spec.guest_spec(spec, root_path="/guest/root", mounts=spec.mounts[:1]).message
    assert message.Root.Path == "/guest/root"
    assert message.Root.Readonly
    assert [mount.destination for mount in message.Mounts] == ["/proc"]
    assert [hook.Path for hook in message.Hooks.CreateContainer] == ["/bin/c"]
    assert [hook.Path for hook in message.Hooks.StartContainer] == ["/bin/d"]
    for host_only in ("Prestart", "CreateRuntime", "Poststart", "Poststop"):
        assert not getattr(message.Hooks, host_only)
    assert set(message.Annotations) == {
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    }
    assert [(ns.Type, ns.Path) for ns in message.Linux.Namespaces] == [
        ("ipc", ""),
        ("uts", ""),
        ("mount", ""),
    ]
    resources = message.Linux.Resources
    assert not resources.Devices
    for name in ("Pids", "BlockIO", "Network"):
        assert not resources.HasField(name)
    assert (resources.CPU.Cpus, resources.CPU.Mems, resources.CPU.Shares) == ("", "", 1024)
    assert resources.Memory.Limit == 1 << 30
    assert [device.Path for device in message.Linux.Devices] == ["/dev/fuse"]
    assert message.Linux.HasField("Seccomp")
    assert message.Process.SelinuxLabel == message.Process.ApparmorProfile == ""
    assert message.Linux.MountLabel == ""
    assert message.Linux.CgroupsPath == "/kubepods/pod1/web"


def test_switches() -> None:
    spec = Spec(FULL, Path("/b"))
    message = guest_spec.guest_spec(
        spec,
        root_path="/r",
        mounts=[],
        seccomp=False,
        selinux=True,
        vfio_in_guest_kernel=False,
    ).message
    assert not message.Linux.HasField("Seccomp")
    assert message.Process.SelinuxLabel
    assert message.Linux.MountLabel
    assert len(message.Linux.Devices) == 2


def test_process_of_an_exec() -> None:
    process = guest_spec.process_from_json(json.dumps(FULL["process"]).encode()).message
    assert list(process.Args) == ["sh", "-c", "true"]
    assert process.Terminal
    assert process.ApparmorProfile == ""
    plain = guest_spec.process_from_json(b'{"args": ["true"]}').message
    assert plain.Cwd == "/"
    for bad, message in (
        (b"{}", "process.args"),
        (b'{"args": ["x"], "cwd": "y"}', "process.cwd"),
        (b'{"args": ["x"], "env": ["a\\u0000"]}', r"process.env\[0\]"),
        (b'{"args": ["\\ud800"]}', r"process.args\[0\]"),
        (b"[]", "process: must be"),
        (b"nonsense", "not JSON"),
    ):
        with pytest.raises(SpecError, match=message):
            guest_spec.process_from_json(bad)


def test_resources_of_an_update() -> None:
    data = json.dumps(FULL["linux"]["resources"]).encode()
    converted = guest_spec.resources_from_json(data)
    assert converted.message.CPU.Cpus == "0-3"
    guest_spec.guest_resources(converted.message)
    assert converted.message.CPU.Cpus == ""
    assert converted.lost == ["resources.unified"]
    with pytest.raises(SpecError, match=r"resources\.cpu\.quota"):
        guest_spec.resources_from_json(b'{"cpu": {"quota": "x"}}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(string.printable, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FULL)), JSON)
def test_any_value_anywhere_is_taken_or_refused_clearly(key: str, value: object) -> None:
    document = {**FULL, key: value}
    try:
        spec = Spec(document, Path("/b"))
        spec.check_container()
        guest_spec.guest_spec(spec, root_path="/r", mounts=spec.mounts)
    except SpecError as error:
        assert ": " in str(error)


def test_a_message_with_options_is_the_entry_of_a_map() -> None:
    """What `guest_spec` tells them by."""

    def below(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for nested in message.nested_types:
            yield from below(nested)

    messages = [m for top in oci_pb2.DESCRIPTOR.message_types_by_name.values() for m in below(top)]
    entries = {m.full_name for m in messages if m.GetOptions().map_entry}
    assert "grpc.Spec.AnnotationsEntry" in entries
    assert {m.full_name for m in messages if m.has_options} == entries
