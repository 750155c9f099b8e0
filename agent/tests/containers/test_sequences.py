# SPDX-License-Identifier: Apache-2.0
"""The calls of Kata's two runtimes in the life of a pod, in their order and with their habits.

Left out is what would change the host that these tests run on: interfaces, clock, CPUs.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.api import agent_pb2 as pb
from agent.api import health_pb2
from ttrpc.errors import Code, RpcError

SHM = "/run/kata-containers/sandbox/shm"


async def check(guest: Any) -> None:
    stub = guest.client.stub(health_pb2.DESCRIPTOR.services_by_name["Health"])
    reply = await stub.Check(health_pb2.CheckRequest(), timeout=30)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert (await stub.Version(health_pb2.CheckRequest(), timeout=30)).agent_version


async def create_sandbox(guest: Any, **more: Any) -> None:
    request = pb.CreateSandboxRequest(hostname="pod-1", sandbox_id="s1", **more)
    request.dns.extend(["nameserver 192.0.2.1", "search example.org"])
    request.storages.add(
        driver="ephemeral", source="shm", fstype="tmpfs", mount_point=SHM,
        options=["mode=1777", "size=67108864"],
    )  # fmt: skip
    await guest.call.CreateSandbox(request, timeout=30)


def spec_with_shm(guest: Any, container_id: str, *args: str, terminal: bool = False) -> Any:
    spec = guest.spec(container_id, *args, terminal=terminal)
    spec.Mounts.add(destination="/dev/shm", type="bind", source=SHM, options=["rbind"])
    spec.Process.ApparmorProfile = "cri-containerd.apparmor.d"
    return spec


async def test_the_go_runtime(guest: Any) -> None:
    """Reads both outputs to their end by calls, and only then waits for the process."""
    call = guest.call
    await check(guest)
    assert any(one.name == "lo" for one in (await call.ListInterfaces(
        pb.ListInterfacesRequest(), timeout=30)).Interfaces)  # fmt: skip
    await create_sandbox(guest)
    details = await call.GetGuestDetails(
        pb.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True), timeout=30
    )
    assert "ephemeral" in details.agent_details.storage_handlers
    spec = spec_with_shm(guest, "pod", "sleep", "1000")
    create = pb.CreateContainerRequest(container_id="pod", exec_id="pod", OCI=spec)
    await call.CreateContainer(create, timeout=30)
    await guest.start("pod")
    script = "read line; echo $line > /dev/shm/file; cat /dev/shm/file; cat; echo bad >&2; exit 9"
    spec = spec_with_shm(guest, "c1", "sh", "-c", script)
    create = pb.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=spec)
    create.sandbox_pidns = True
    await call.CreateContainer(create, timeout=30)
    out: dict[str, Any] = {}

    async def copy(name: str, stderr: bool) -> None:
        out[name] = await guest.read("c1", "c1", stderr=stderr)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy, "stdout", False)  # the runtime reads before the start
        nursery.start_soon(copy, "stderr", True)
        await guest.start("c1")
        for data in (b"line\n", b"more"):
            request = pb.WriteStreamRequest(container_id="c1", exec_id="c1", data=data)
            assert (await call.WriteStdin(request, timeout=30)).len == len(data)
        stdin = pb.CloseStdinRequest(container_id="c1", exec_id="c1")
        await call.CloseStdin(stdin, timeout=30)
    assert out == {"stdout": b"line\nmore", "stderr": b"bad\n"}
    assert await guest.wait("c1", "c1") == 9
    with pytest.raises(RpcError):  # no memory controller here: an error, not a hang
        await call.UpdateContainer(pb.UpdateContainerRequest(container_id="no"), timeout=30)
    await guest.signal("c1", signal.SIGKILL)  # the runtime kills what has ended already
    await guest.remove("c1")
    await guest.signal("pod", signal.SIGKILL)
    assert await guest.wait("pod", "pod") == 137
    await guest.remove("pod")
    await call.DestroySandbox(pb.DestroySandboxRequest(), timeout=30)
    assert not Path(f"/proc/{guest.pid}/root{SHM}").exists()


async def test_the_rust_runtime(guest: Any) -> None:
    """Waits for the process while it still reads its output."""
    call = guest.call
    await check(guest)
    await create_sandbox(guest, sandbox_pidns=False)
    spec = spec_with_shm(guest, "c1", "sh", terminal=True)
    spec.Process.ConsoleSize.Height, spec.Process.ConsoleSize.Width = 24, 80
    await call.CreateContainer(pb.CreateContainerRequest(container_id="c1", OCI=spec), timeout=30)
    await guest.start("c1")
    results: dict[str, Any] = {}

    async def wait(exec_id: str) -> None:
        results[f"status {exec_id}"] = await guest.wait("c1", exec_id)

    async def read(exec_id: str) -> None:
        results[f"output {exec_id}"] = await guest.read("c1", exec_id)

    async def oom() -> None:
        await call.GetOOMEvent(pb.GetOOMEventRequest())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(oom)  # pending all the time
        async with trio.open_nursery() as processes:
            processes.start_soon(wait, "")
            processes.start_soon(read, "")
            resize = pb.TtyWinResizeRequest(container_id="c1", row=40, column=90)
            await call.TtyWinResize(resize, timeout=30)
            await guest.exec("c1", "e1", "sh", "-c", "echo from exec; sleep 0.2; exit 2")
            processes.start_soon(wait, "e1")
            processes.start_soon(read, "e1")
            typed = pb.WriteStreamRequest(container_id="c1", data=b"stty size; exit 3\n")
            await call.WriteStdin(typed, timeout=30)
            while "status e1" not in results:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert results["status "] == 3
    assert b"40 90\r\n" in results["output "]
    assert (results["status e1"], results["output e1"]) in (
        (2, b"from exec\n"),
        (137, b"from exec\n"),
    )
    await guest.remove("c1")
    with pytest.raises(RpcError) as caught:
        await guest.remove("c1")
    assert caught.value.code == Code.NOT_FOUND
    await call.DestroySandbox(pb.DestroySandboxRequest(), timeout=30)


async def test_a_sandbox_destroyed_with_all_its_containers(guest: Any) -> None:
    await create_sandbox(guest)
    for name in ("c1", "c2"):
        await guest.run(name, "sleep", "1000")
    await guest.call.DestroySandbox(pb.DestroySandboxRequest(), timeout=30)
    with pytest.raises(RpcError) as caught:
        await guest.start("c1")
    assert caught.value.code == Code.NOT_FOUND
    children = Path(f"/proc/{guest.pid}/task/{guest.pid}/children").read_text()
    assert not children.strip()
