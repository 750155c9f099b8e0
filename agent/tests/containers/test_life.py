# SPDX-License-Identifier: Apache-2.0
"""Containers and processes from their creation to their end."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from agent.api import agent_pb2 as pb
from ttrpc.errors import Code, RpcError


async def test_from_creation_to_removal(guest: Any) -> None:
    before = guest.descriptors()
    await guest.create("c1", "sh", "-c", "echo hello; echo oops >&2; exit 7")
    await guest.start("c1")
    assert await guest.read("c1") == b"hello\n"
    assert await guest.read("c1", stderr=True) == b"oops\n"
    assert await guest.wait("c1") == 7
    assert await guest.wait("c1") == 7  # the first process can be waited for until it is removed
    await guest.remove("c1")
    with pytest.raises(RpcError) as caught:
        await guest.wait("c1")
    assert caught.value.code == Code.NOT_FOUND
    assert guest.descriptors() == before
    assert not list(Path(f"/proc/{guest.pid}/root/run/kata-containers").iterdir())
    assert not list(Path(f"/proc/{guest.pid}/root/run/agent").iterdir())


async def test_exec_statuses(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    before = guest.descriptors()
    await guest.exec("c1", "e1", "sh", "-c", "exit 3")
    assert await guest.wait("c1", "e1") == 3
    await guest.exec("c1", "e2", "sleep", "1000")
    await guest.signal("c1", signal.SIGTERM, "e2")
    assert await guest.wait("c1", "e2") == 128 + signal.SIGTERM
    await guest.exec("c1", "e1", "true")  # an id may be used again once it was waited for
    assert await guest.read("c1", "e1") == b""
    assert await guest.read("c1", "e1", stderr=True) == b""
    assert await guest.wait("c1", "e1") == 0
    with pytest.raises(RpcError) as caught:
        await guest.wait("c1", "e1")
    assert caught.value.code == Code.NOT_FOUND
    await guest.exec("c1", "e2", "true")
    assert await guest.wait("c1", "e2") == 0
    with trio.fail_after(20):
        while guest.descriptors() > before + 2:  # e2's unread outputs linger
            await trio.sleep(0.1)


async def test_many_short_execs_at_once(guest: Any) -> None:
    """Each may be over before crun has told its pid."""
    await guest.run("c1", "sleep", "1000")
    statuses = {}

    async def one(number: int) -> None:
        await guest.exec("c1", f"e{number}", "sh", "-c", f"exit {number}")
        statuses[number] = await guest.wait("c1", f"e{number}")

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(one, number)
    assert statuses == {number: number for number in range(12)}


async def test_a_first_process_without_handler_dies_of_sigterm(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    await guest.signal("c1", signal.SIGTERM)
    assert await guest.wait("c1") == 128 + signal.SIGKILL
    await guest.signal("c1", signal.SIGTERM)  # it has ended: no error


async def test_a_handler_gets_its_sigterm(guest: Any) -> None:
    await guest.run("c1", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
    request = pb.ReadStreamRequest(container_id="c1", len=100)
    assert (await guest.call.ReadStdout(request, timeout=20)).data == b"ready\n"
    await guest.signal("c1", signal.SIGTERM)
    assert await guest.wait("c1") == 5


async def test_sigkill_of_a_container_ends_its_execs(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    await guest.exec("c1", "e1", "sleep", "1000")
    await guest.signal("c1", signal.SIGKILL)
    assert await guest.wait("c1") == 137
    assert await guest.wait("c1", "e1") == 137


async def test_several_waiters(guest: Any) -> None:
    await guest.run("c1", "sleep", "1000")
    await guest.exec("c1", "e1", "sleep", "1000")
    results = []

    async def wait() -> None:
        results.append(await guest.wait("c1", "e1"))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await guest.signal("c1", signal.SIGINT, "e1")
    assert results == [130] * 3


async def test_pause_and_resume(guest: Any) -> None:
    await guest.run("c1", "sh", "-c", "while :; do echo x; sleep 0.05; done")
    request = pb.ReadStreamRequest(container_id="c1", len=1)
    await guest.call.PauseContainer(pb.PauseContainerRequest(container_id="c1"), timeout=20)
    with pytest.raises(RpcError) as caught:  # what it had written comes, and then no more
        while True:
            await guest.call.ReadStdout(request, timeout=0.5)
    assert caught.value.code == Code.DEADLINE_EXCEEDED
    await guest.call.ResumeContainer(pb.ResumeContainerRequest(container_id="c1"), timeout=20)
    assert (await guest.call.ReadStdout(request, timeout=20)).data
    await guest.signal("c1", signal.SIGKILL)
    assert await guest.wait("c1") == 137


async def test_a_shared_pid_namespace_is_the_first_containers(guest: Any) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.create("c0", "true", sandbox_pidns=True)
    assert caught.value.code == Code.FAILED_PRECONDITION
    await guest.run("pause", "sleep", "1000")
    await guest.run("c1", "sh", "-c", "cat /proc/1/cmdline", sandbox_pidns=True)
    assert await guest.read("c1") == b"sleep\x001000\x00"
    await guest.run("c2", "sh", "-c", "echo $$")
    assert await guest.read("c2") == b"1\n"


async def test_a_shared_pid_namespace_without_a_pause_container(guest: Any) -> None:
    await guest.call.CreateSandbox(pb.CreateSandboxRequest(sandbox_pidns=True), timeout=20)
    await guest.run("c1", "sh", "-c", "echo $$")
    assert await guest.read("c1") == b"1\n", "one of its own"
    await guest.run("c2", "sleep", "1234", sandbox_pidns=True)
    await guest.run("c3", "sh", "-c", "cat /proc/*/cmdline", sandbox_pidns=True)
    assert b"sleep\x001234" in await guest.read("c3")
    # Orphans end without a trace, and number 1 stays whatever it is told.
    script = "(sleep 0.1 & ); kill 1; kill -9 1; sleep 0.5; grep -l '(zombie)' /proc/*/status"
    await guest.run("c4", "sh", "-c", script, sandbox_pidns=True)
    assert await guest.wait("c4") == 1, "no zombie"
    await guest.run("c5", "cat", "/proc/1/comm", sandbox_pidns=True)
    assert await guest.read("c5") == b"pause\n"


async def test_a_program_that_is_not_there(guest: Any) -> None:
    before = guest.descriptors()
    with pytest.raises(RpcError) as caught:
        await guest.create("c1", "/no/such/program")
    assert caught.value.code == Code.INTERNAL
    assert "/no/such/program" in caught.value.message
    assert guest.descriptors() == before
    await guest.run("c1", "sleep", "1000")  # nothing of the failure is in the way
    with pytest.raises(RpcError) as caught:
        await guest.exec("c1", "e1", "/no/such/program")
    assert "/no/such/program" in caught.value.message
    await guest.exec("c1", "e1", "true")
    assert await guest.wait("c1", "e1") == 0


@pytest.mark.parametrize("name", ["", "a", ".hidden", "a/b", "a b", "-rf", "x" * 300, "é1"])
async def test_ids_that_are_refused(guest: Any, name: str) -> None:
    with pytest.raises(RpcError) as caught:
        await guest.create(name, "true")
    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_a_long_id_with_a_terminal(guest: Any) -> None:
    name = "x" * 128
    await guest.run(name, "tty", terminal=True)
    assert await guest.read(name) == b"/dev/pts/0\r\n"


async def test_unknown_things(guest: Any) -> None:
    calls = guest.call
    for call, request in (
        (calls.StartContainer, pb.StartContainerRequest(container_id="no")),
        (calls.SignalProcess, pb.SignalProcessRequest(container_id="no", signal=9)),
        (calls.StatsContainer, pb.StatsContainerRequest(container_id="no")),
        (calls.ReadStdout, pb.ReadStreamRequest(container_id="no")),
    ):
        with pytest.raises(RpcError) as caught:
            await call(request, timeout=20)
        assert caught.value.code == Code.NOT_FOUND
    await guest.create("c1", "true")
    with pytest.raises(RpcError) as caught:
        await guest.create("c1", "true")
    assert caught.value.code == Code.ALREADY_EXISTS
    with pytest.raises(RpcError) as caught:
        await guest.wait("c1", "no")
    assert caught.value.code == Code.NOT_FOUND
    with pytest.raises(RpcError) as caught:
        await calls.SetPolicy(pb.SetPolicyRequest(), timeout=20)
    assert caught.value.code == Code.UNIMPLEMENTED


async def test_a_dead_clients_oom_call_takes_no_event(guest: Any) -> None:
    """And its deadline is kept by the agent."""
    with pytest.raises(RpcError) as caught:
        await guest.call.GetOOMEvent(pb.GetOOMEventRequest(), timeout=0.2)
    assert caught.value.code == Code.DEADLINE_EXCEEDED
    async with guest.another() as call, trio.open_nursery() as nursery:
        nursery.start_soon(_ignore, call.GetOOMEvent, pb.GetOOMEventRequest())
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()


async def _ignore(call: Any, request: Any) -> None:
    await call(request)
