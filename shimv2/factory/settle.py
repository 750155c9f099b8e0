# SPDX-License-Identifier: Apache-2.0
"""Run a guest's hot path once, so that its clones find all of it in memory."""

from __future__ import annotations

import contextlib

from agent.api import agent_pb2, types_pb2
from shimv2.guest import Guest
from shimv2.guest_spec import spec_from_json

CONTAINER = "settle"
_ROOT = f"/run/kata-containers/{CONTAINER}/rootfs"
_ARGS = ["/bin/sh", "-c", "read line"]
_EXEC_ARGS = ["/bin/sh", "-c", ":"]
_NAMESPACES = ("pid", "ipc", "uts", "mount", "cgroup")
_PROCESS = {
    "args": _ARGS,
    "cwd": "/",
    "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    "user": {"uid": 0, "gid": 0},
    "capabilities": {
        kind: ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
        for kind in ("bounding", "effective", "permitted")
    },
    "noNewPrivileges": True,
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
}
_SECURE = ["nosuid", "noexec", "nodev"]
_MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": _SECURE},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": _SECURE},
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _SECURE},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_SECURE, "ro"]},
]
_SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{"names": ["kexec_load"], "action": "SCMP_ACT_ERRNO"}],
}
_SPEC = {
    "ociVersion": "1.0.2",
    "process": _PROCESS,
    "root": {"path": _ROOT, "readonly": True},
    "hostname": CONTAINER,
    "mounts": _MOUNTS,
    "linux": {
        "namespaces": [{"type": kind} for kind in _NAMESPACES],
        "cgroupsPath": f"/{CONTAINER}",
        "seccomp": _SECCOMP,
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
}

_LOOPBACK = types_pb2.Interface(
    name="lo",
    hwAddr="00:00:00:00:00:00",
    IPAddresses=[
        types_pb2.IPAddress(address="127.0.0.1", mask="8"),
        types_pb2.IPAddress(family=types_pb2.v6, address="::1", mask="128"),
    ],
)


async def settle(guest: Guest) -> None:
    """A container whose root is the guest's own: create, start, exec, statistics, its end, and
    remove.  All that the agent imports lazily, crun and what it reads is in the page cache then.

    Raises:
        RpcError: the agent or crun failed; then a clone would fail too.
    """
    await guest.set_time()
    await guest.become_another()
    await _network(guest)
    storage = agent_pb2.Storage(
        driver="bind", source="/", fstype="bind", mount_point=_ROOT, options=["bind", "ro"]
    )
    streams = await guest.open_streams(CONTAINER, "", stdin=True, stderr=True)
    async with contextlib.aclosing(streams):
        request = agent_pb2.CreateContainerRequest(
            container_id=CONTAINER,
            exec_id=CONTAINER,
            OCI=spec_from_json(_SPEC).message,
            storages=[storage],
        )
        streams.put_ports(request)
        await guest.call("CreateContainer", request)
        await guest.call("StartContainer", agent_pb2.StartContainerRequest(container_id=CONTAINER))
        await _execute(guest)
        await guest.call("StatsContainer", agent_pb2.StatsContainerRequest(container_id=CONTAINER))
        await guest.call(
            "SignalProcess", agent_pb2.SignalProcessRequest(container_id=CONTAINER, signal=9)
        )
        await guest.wait_process(CONTAINER, CONTAINER)
    await guest.call("RemoveContainer", agent_pb2.RemoveContainerRequest(container_id=CONTAINER))


async def _network(guest: Guest) -> None:
    """What a pod's network takes, on loopback, which it leaves as it is."""
    await guest.call("UpdateInterface", agent_pb2.UpdateInterfaceRequest(interface=_LOOPBACK))
    await guest.call("UpdateRoutes", agent_pb2.UpdateRoutesRequest())


async def _execute(guest: Guest) -> None:
    streams = await guest.open_streams(CONTAINER, "exec", stdin=False, stderr=True)
    async with contextlib.aclosing(streams):
        request = agent_pb2.ExecProcessRequest(container_id=CONTAINER, exec_id="exec")
        process = {**_PROCESS, "args": _EXEC_ARGS}
        request.process.CopyFrom(spec_from_json({**_SPEC, "process": process}).message.Process)
        streams.put_ports(request)
        await guest.call("ExecProcess", request)
        await guest.wait_process(CONTAINER, "exec")
