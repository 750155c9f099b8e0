# SPDX-License-Identifier: Apache-2.0
"""A real agent with real crun in namespaces of the host, and what one asks of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.api import agent_pb2 as pb
from agent.api import health_pb2, oci_pb2
from ttrpc.client import Client

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
AGENT = pb.DESCRIPTOR.services_by_name["AgentService"]
CGROUPS = f"pykata-agent-test-{os.getpid()}"  # tests run in several processes at once
PROGRAMS = ("sh", "true", "sleep", "echo", "cat", "dd", "head", "id", "stty", "tty", "env", "kill")
_MOUNTS = (
    ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
    ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
)


def make_spec(root: Path, container_id: str, *args: str, terminal: bool = False) -> oci_pb2.Spec:
    """What a shim sends for a busybox container."""
    spec = oci_pb2.Spec(Version="1.2.0")
    spec.Process.CopyFrom(make_process(*args, terminal=terminal))
    spec.Root.Path = str(root)
    for destination, kind, source, options in _MOUNTS:
        spec.Mounts.add(destination=destination, type=kind, source=source, options=options)
    for kind in ("mount", "ipc", "uts", "pid"):
        spec.Linux.Namespaces.add(Type=kind)
    spec.Linux.CgroupsPath = f"/{CGROUPS}/{container_id}"
    return spec


def make_process(*args: str, terminal: bool = False, uid: int = 0) -> oci_pb2.Process:
    process = oci_pb2.Process(Args=args, Cwd="/", Terminal=terminal)
    process.Env.extend(["PATH=/bin", "TERM=xterm"])
    process.User.UID = process.User.GID = uid
    return process


class Guest:
    """The client's side of a running agent.

    Attributes:
        call: the stub of AgentService.
        client: its connection.
    """

    def __init__(
        self, client: Client, socket: Path, ports: list[int], root: Path, pid: int
    ) -> None:
        self.client = client
        self.call: Any = client.stub(AGENT)
        self.root = root
        self.pid = pid
        self._socket = socket
        self._port, self.console_port = ports

    @asynccontextmanager
    async def another(self) -> AsyncIterator[Any]:
        """A second connection's stub."""
        async with Client(await trio.open_unix_socket(str(self._socket))) as client:
            yield client.stub(AGENT)

    async def stream(self) -> tuple[trio.SocketStream, int]:
        """A raw stream, and the port that the agent knows it by."""
        stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        return stream, stream.socket.getsockname()[1]

    def spec(self, container_id: str, *args: str, terminal: bool = False) -> oci_pb2.Spec:
        return make_spec(self.root, container_id, *args, terminal=terminal)

    async def create(
        self, container_id: str, *args: str, terminal: bool = False, **more: Any
    ) -> None:
        spec = self.spec(container_id, *args, terminal=terminal)
        await self.call.CreateContainer(
            pb.CreateContainerRequest(container_id=container_id, OCI=spec, **more), timeout=20
        )

    async def start(self, container_id: str) -> None:
        await self.call.StartContainer(
            pb.StartContainerRequest(container_id=container_id), timeout=20
        )

    async def run(self, container_id: str, *args: str, **more: Any) -> None:
        await self.create(container_id, *args, **more)
        await self.start(container_id)

    async def exec(self, container_id: str, exec_id: str, *args: str, **more: Any) -> None:
        terminal, uid = more.pop("terminal", False), more.pop("uid", 0)
        process = make_process(*args, terminal=terminal, uid=uid)
        await self.call.ExecProcess(
            pb.ExecProcessRequest(
                container_id=container_id, exec_id=exec_id, process=process, **more
            ),
            timeout=20,
        )

    async def wait(self, container_id: str, exec_id: str = "") -> int:
        reply = await self.call.WaitProcess(
            pb.WaitProcessRequest(container_id=container_id, exec_id=exec_id), timeout=20
        )
        return int(reply.status)

    async def signal(self, container_id: str, number: int, exec_id: str = "") -> None:
        await self.call.SignalProcess(
            pb.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=number),
            timeout=20,
        )

    async def remove(self, container_id: str) -> None:
        await self.call.RemoveContainer(
            pb.RemoveContainerRequest(container_id=container_id), timeout=20
        )

    async def read(self, container_id: str, exec_id: str = "", *, stderr: bool = False) -> bytes:
        """All of an output stream by calls; the agent tells its end by an error."""
        from ttrpc.errors import RpcError

        call = self.call.ReadStderr if stderr else self.call.ReadStdout
        request = pb.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=32768)
        data = b""
        while True:
            try:
                data += (await call(request, timeout=20)).data
            except RpcError as error:
                assert "EOF" in error.message, error
                return data

    def descriptors(self) -> int:
        """How many descriptors the agent holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


async def receive_all(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(20):
        while more := await stream.receive_some(65536):
            data += more
    return data


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with a static busybox."""
    busybox = shutil.which("busybox")
    if busybox is None or b"not a dynamic" not in _ldd(busybox):
        pytest.skip("needs a static busybox")
    root = tmp_path_factory.mktemp("root")
    for name in ("bin", "proc", "dev", "tmp", "etc"):
        (root / name).mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    for name in PROGRAMS:
        (root / "bin" / name).symlink_to("busybox")
    root.chmod(0o755)
    for parent in root.parents[:2]:
        parent.chmod(0o755)  # users of the container go through it
    return root


def _ldd(path: str) -> bytes:
    done = subprocess.run(["ldd", path], capture_output=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def agent_process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, list[int]]]:
    """(unshare's process, the agent's socket, the ports of the streams and the console)."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program in ("crun", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    command = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*command, sys.executable, str(HERE / "host_agent.py"), str(ROOT), str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        word, *ports = process.stdout.readline().decode().split()
        assert word == "ready"
        yield process, tmp_path / "agent.sock", [int(port) for port in ports]
    finally:
        process.kill()
        process.communicate()
        _remove_cgroups()


def _remove_cgroups() -> None:
    """The cgroups of containers that a test left behind; their processes died with the agent."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in mounts if line.split()[2].startswith("cgroup")]
    for point in points:
        top = Path(point) / CGROUPS
        for directory in sorted(top.glob("**/"), reverse=True) if top.is_dir() else ():
            for _ in range(100):
                try:
                    directory.rmdir()
                    break
                except OSError:  # a dying process is still in it
                    trio.run(trio.sleep, 0.02)


@pytest.fixture
async def guest(
    agent_process: tuple[subprocess.Popen[bytes], Path, list[int]], busybox_root: Path
) -> AsyncIterator[Guest]:
    process, socket, ports = agent_process
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    async with Client(await trio.open_unix_socket(str(socket))) as client:
        health = client.stub(health_pb2.DESCRIPTOR.services_by_name["Health"])
        await health.Check(health_pb2.CheckRequest(), timeout=20)
        yield Guest(client, socket, ports, busybox_root, int(children[0]))
