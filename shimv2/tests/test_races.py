# SPDX-License-Identifier: Apache-2.0
"""Requests against each other and against the loss of the VM: status, events, their order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shimv2.api import task_types_pb2
from shimv2.share import ShareError
from shimv2.streams import ProcessStreams, RpcWriter
from shimv2.tests.fakes import FakeLife, Shim, shim_of
from ttrpc.errors import Code, RpcError
from vmm.errors import VmmError


@pytest.fixture
async def shim(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Shim]:
    async with shim_of(tmp_path, monkeypatch) as shim:
        yield shim


class Gate:
    """Holds a call of the guest until it is opened."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.opened = trio.Event()

    async def __call__(self, _request: Any) -> None:
        self.reached.set()
        await self.opened.wait()


async def refuse(_request: Any) -> None:
    raise RpcError(Code.INTERNAL, "refused")


async def create_with_gate(shim: Shim, gate: Gate, nursery: trio.Nursery, **more: Any) -> Any:
    """Start a Create that waits in the guest; its status, later, is in the list."""
    await shim.create("first")
    shim.guest.on["CreateContainer"] = gate
    found: list[Code] = []

    async def create() -> None:
        found.append(
            await shim.code(
                "Create", "CreateTaskRequest", id="web", bundle=str(shim.bundle("web")), **more
            )
        )

    nursery.start_soon(create)
    await gate.reached.wait()
    return found


async def test_a_plain_life_has_its_events_in_order(shim: Shim) -> None:
    await shim.create()
    await shim.ask("Start", id="web")
    assert await shim.code("Delete", id="web") == Code.FAILED_PRECONDITION
    await shim.add_exec("e")
    await shim.ask("Start", id="web", exec_id="e")
    shim.guest.end("web", "e", 3)
    assert (await shim.ask("Wait", id="web", exec_id="e")).exit_status == 3
    shim.guest.end("web", status=4)
    assert (await shim.ask("Wait", id="web")).exit_status == 4
    assert (await shim.ask("Delete", id="web")).exit_status == 4
    for method in ("State", "Start", "Kill", "Wait", "Delete", "Pids", "Stats"):
        assert await shim.code(method, id="web") == Code.NOT_FOUND, method
    assert shim.events.names() == [
        "TaskCreate web",
        "TaskStart web",
        "TaskExecAdded web e",
        "TaskExecStarted web e",
        "TaskExit e 3",
        "TaskExit web 4",
        "TaskDelete web",
    ]


async def test_what_is_being_created_cannot_be_found(shim: Shim, nursery: trio.Nursery) -> None:
    gate = Gate()
    found = await create_with_gate(shim, gate, nursery)
    for method in ("State", "Start", "Kill", "Delete", "Wait"):
        assert await shim.code(method, id="web") == Code.NOT_FOUND, method
    again = await shim.code("Create", "CreateTaskRequest", id="web", bundle=str(shim.root / "web"))
    assert again == Code.ALREADY_EXISTS
    await shim.ask("Shutdown", id="first")  # a container is on its way: not yet
    gate.opened.set()
    await trio.testing.wait_all_tasks_blocked()
    assert found == [Code.OK]
    assert not shim.sandbox._shutdown.is_set()


async def test_a_vm_lost_while_a_container_is_created(shim: Shim, nursery: trio.Nursery) -> None:
    found = await create_with_gate(shim, Gate(), nursery)
    shim.guest.declare_lost("killed")
    await trio.testing.wait_all_tasks_blocked()
    assert found == [Code.UNAVAILABLE]
    assert shim.events.names() == ["TaskCreate first", "TaskExit first 255"]


async def test_delete_of_the_last_while_another_is_created(
    shim: Shim, nursery: trio.Nursery
) -> None:
    gate = Gate()
    found = await create_with_gate(shim, gate, nursery)
    await shim.ask("Kill", id="first", signal=9)
    shim.guest.end("first", status=137)
    await shim.ask("Wait", id="first")
    await shim.ask("Delete", id="first")
    gate.opened.set()
    await trio.testing.wait_all_tasks_blocked()
    assert found == [Code.OK]
    assert shim.sandbox.is_running


async def test_a_failed_create_leaves_a_shim_that_can_create(shim: Shim) -> None:
    FakeLife.failures.append(VmmError("no memory"))
    with pytest.raises(RpcError, match="no memory"):
        await shim.create()
    await shim.create()
    assert len(FakeLife.lives) == 2
    await shim.ask("Start", id="web")
    assert shim.events.names() == ["TaskCreate web", "TaskStart web"]
    assert not shim.sandbox.exited_at


async def test_a_refused_create_leaves_a_shim_that_can_create(shim: Shim) -> None:
    bad = shim.root / "bad"
    bad.mkdir()
    (bad / "config.json").write_text((shim.bundle("web") / "config.json").read_text())
    with pytest.raises(RpcError, match="not a directory"):
        await shim.create(bundle=bad)
    assert shim.sandbox.containers == {}
    assert not FakeLife.lives[0].is_running
    await shim.create()
    assert shim.events.names() == ["TaskCreate web"]


async def test_a_release_that_fails_does_not_hide_why(shim: Shim, monkeypatch: Any) -> None:
    def remove(_container_id: str) -> None:
        raise OSError(16, "busy")

    monkeypatch.setattr(shim.sandbox.share, "remove_container", remove)
    FakeLife.failures.append(VmmError("no memory"))
    with pytest.raises(RpcError, match="no memory"):
        await shim.create()
    assert shim.sandbox.containers == {}


async def test_a_create_cancelled_in_the_guest_is_taken_back(
    shim: Shim, nursery: trio.Nursery
) -> None:
    await shim.create("first")
    gate = Gate()
    shim.guest.on["CreateContainer"] = gate
    shim.bundle("web")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as inner:
            inner.start_soon(shim.create, "web")
            await gate.reached.wait()
            scope.cancel()
    assert shim.guest.calls[-2:] == ["CreateContainer", "RemoveContainer"]
    assert await shim.code("State", id="web") == Code.NOT_FOUND
    del shim.guest.on["CreateContainer"]
    await shim.create("web")


async def test_delete_during_start(shim: Shim, nursery: trio.Nursery) -> None:
    gate = Gate()
    await shim.create()
    shim.guest.on["StartContainer"] = gate
    found: list[Code] = []

    async def delete() -> None:
        found.append(await shim.code("Delete", id="web"))

    nursery.start_soon(lambda: shim.ask("Start", id="web"))
    await gate.reached.wait()
    nursery.start_soon(delete)
    await trio.testing.wait_all_tasks_blocked()
    gate.opened.set()
    await trio.testing.wait_all_tasks_blocked()
    assert found == [Code.FAILED_PRECONDITION]
    assert (await shim.ask("State", id="web")).status == task_types_pb2.RUNNING


async def test_a_start_that_is_given_up_still_counts(shim: Shim) -> None:
    gate = Gate()
    await shim.create()
    shim.guest.on["StartContainer"] = gate
    async with trio.open_nursery() as inner:
        inner.start_soon(lambda: shim.ask("Start", id="web"))
        await gate.reached.wait()
        inner.cancel_scope.cancel()
        gate.opened.set()
    assert (await shim.ask("State", id="web")).status == task_types_pb2.RUNNING
    assert "TaskStart web" in shim.events.names()


async def test_a_terminal_that_cannot_be_sized_does_not_fail_the_start(shim: Shim) -> None:
    await shim.create(terminal=True)
    shim.guest.on["TtyWinResize"] = refuse
    await shim.ask("ResizePty", id="web", width=80, height=24)
    await shim.ask("Start", id="web")
    assert shim.events.names() == ["TaskCreate web", "TaskStart web"]


async def test_two_deletes(shim: Shim, nursery: trio.Nursery) -> None:
    gate = Gate()
    await shim.create()
    await shim.create("other")
    await shim.ask("Start", id="web")
    shim.guest.end("web")
    await shim.ask("Wait", id="web")
    shim.guest.on["RemoveContainer"] = gate
    found: list[Code] = []

    async def delete() -> None:
        found.append(await shim.code("Delete", id="web"))

    nursery.start_soon(delete)
    nursery.start_soon(delete)
    await gate.reached.wait()
    gate.opened.set()
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(found) == [Code.OK, Code.NOT_FOUND]
    assert shim.events.names().count("TaskDelete web") == 1


async def test_a_delete_given_up_while_the_vm_goes_has_its_event(shim: Shim) -> None:
    await shim.create()
    shim.guest.end("web")
    await shim.ask("Wait", id="web")

    async def stop() -> None:
        await trio.sleep_forever()

    FakeLife.lives[0].stop = stop  # type: ignore[method-assign]
    async with trio.open_nursery() as inner:
        inner.start_soon(lambda: shim.ask("Delete", id="web"))
        await trio.testing.wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
    assert shim.events.names()[-1] == "TaskDelete web"


async def test_delete_of_a_created_one_ends_it(shim: Shim, nursery: trio.Nursery) -> None:
    await shim.create()
    await shim.add_exec("e")
    found: list[int] = []

    async def wait(exec_id: str) -> None:
        found.append((await shim.ask("Wait", id="web", exec_id=exec_id)).exit_status)

    nursery.start_soon(wait, "")
    nursery.start_soon(wait, "e")
    await trio.testing.wait_all_tasks_blocked()
    await shim.ask("Delete", id="web")
    await trio.testing.wait_all_tasks_blocked()
    assert found == [137, 137]
    names = [name for name in shim.events.names() if "Exec" not in name]
    assert names == ["TaskCreate web", "TaskExit web 137", "TaskDelete web"]


async def test_the_exit_of_an_exec_comes_before_the_delete(shim: Shim) -> None:
    await shim.create()
    await shim.create("other")
    await shim.ask("Start", id="web")
    await shim.add_exec("e")
    await shim.ask("Start", id="web", exec_id="e")
    shim.guest.end("web")
    await shim.ask("Wait", id="web")
    await shim.ask("Delete", id="web")
    shim.guest.end("web", "e", 0)
    await trio.testing.wait_all_tasks_blocked()
    assert shim.events.names()[-3:] == ["TaskExit web 0", "TaskExit e 137", "TaskDelete web"]


async def test_two_starts_of_an_exec(shim: Shim, nursery: trio.Nursery) -> None:
    gate = Gate()
    await shim.create()
    await shim.ask("Start", id="web")
    await shim.add_exec("e")
    shim.guest.on["ExecProcess"] = gate
    found: list[Code] = []

    async def start() -> None:
        found.append(await shim.code("Start", id="web", exec_id="e"))

    nursery.start_soon(start)
    nursery.start_soon(start)
    await gate.reached.wait()
    nursery.start_soon(lambda: shim.code("Delete", id="web", exec_id="e"))
    await trio.testing.wait_all_tasks_blocked()
    gate.opened.set()
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(found) == [Code.OK, Code.FAILED_PRECONDITION]
    assert shim.guest.calls.count("ExecProcess") == 1
    assert (await shim.ask("State", id="web", exec_id="e")).status == task_types_pb2.RUNNING


async def test_an_exec_that_cannot_have_its_streams_has_ended(shim: Shim, monkeypatch: Any) -> None:
    async def open_streams(*_: Any, **__: Any) -> None:
        raise VmmError("no vsock")

    await shim.create()
    await shim.ask("Start", id="web")
    await shim.add_exec("e")
    monkeypatch.setattr(shim.guest, "open_streams", open_streams)
    with pytest.raises(RpcError, match="no vsock"):
        await shim.ask("Start", id="web", exec_id="e")
    _, process = shim.sandbox.find("web", "e")
    assert process._stdio_closed is not None and process._stdio_closed.is_set()
    assert (await shim.ask("Wait", id="web", exec_id="e")).exit_status == 255
    await shim.ask("Delete", id="web", exec_id="e")
    assert await shim.code("Delete", id="web", exec_id="e") == Code.NOT_FOUND


async def test_stdio_that_fails_ends_no_other_process(shim: Shim, monkeypatch: Any) -> None:
    await shim.create()
    await shim.create("other")
    _, process = shim.sandbox.find("other")

    async def close(*_: Any) -> None:
        raise OSError(5, "broken logger")

    monkeypatch.setattr(type(process.stdio), "__aexit__", close)
    await process.close_stdio()
    await trio.testing.wait_all_tasks_blocked()
    monkeypatch.undo()
    assert (await shim.ask("State", id="web")).status == task_types_pb2.CREATED


async def test_streams_by_rpc_do_not_hide_why_an_exec_failed(shim: Shim, monkeypatch: Any) -> None:
    async def open_streams(container_id: str, exec_id: str, **_: Any) -> ProcessStreams:
        streams = ProcessStreams()
        streams.stdin = RpcWriter(shim.guest.call, container_id, exec_id)
        return streams

    async def forget(_request: Any) -> None:
        raise RpcError(Code.NOT_FOUND, "no such process")

    await shim.create()
    await shim.ask("Start", id="web")
    await shim.add_exec("e")
    monkeypatch.setattr(shim.guest, "open_streams", open_streams)
    shim.guest.on["ExecProcess"] = refuse
    shim.guest.on["CloseStdin"] = forget
    with pytest.raises(RpcError, match="refused"):
        await shim.ask("Start", id="web", exec_id="e")


async def test_a_delete_of_a_created_one_in_a_hung_guest(
    shim: Shim, autojump_clock: trio.testing.MockClock
) -> None:
    await shim.create()
    for method in ("SignalProcess", "RemoveContainer", "Check"):
        shim.guest.on[method] = Gate()
    before = trio.current_time()
    await shim.ask("Delete", id="web")
    assert trio.current_time() - before < 10


async def test_ids_in_use(shim: Shim) -> None:
    await shim.create()
    await shim.add_exec("e")
    for exec_id in ("e", "web"):  # the agent takes a container's own id for its init
        with pytest.raises(RpcError) as caught:
            await shim.add_exec(exec_id)
        assert caught.value.code == Code.ALREADY_EXISTS


async def test_wait_survives_the_delete_of_an_exec(shim: Shim, nursery: trio.Nursery) -> None:
    await shim.create()
    await shim.add_exec("e")
    with trio.fail_after(1):
        async with trio.open_nursery() as inner:
            inner.start_soon(lambda: shim.ask("Wait", id="web", exec_id="e"))
            await trio.testing.wait_all_tasks_blocked()
            await shim.ask("Delete", id="web", exec_id="e")


async def test_a_lost_vm_ends_each_process_once(shim: Shim) -> None:
    await shim.create()
    await shim.create("other")
    await shim.ask("Start", id="web")
    await shim.add_exec("e")
    await shim.ask("Start", id="web", exec_id="e")
    shim.guest.declare_lost("killed")
    for container_id, exec_id in (("web", ""), ("web", "e"), ("other", "")):
        answer = await shim.ask("Wait", id=container_id, exec_id=exec_id)
        assert answer.exit_status == 255
    exits = sorted(name for name in shim.events.names() if name.startswith("TaskExit"))
    assert exits == ["TaskExit e 255", "TaskExit other 255", "TaskExit web 255"]
    assert await shim.code("Start", id="other") == Code.FAILED_PRECONDITION
    assert await shim.code("Kill", id="web", signal=9) == Code.NOT_FOUND
    await shim.ask("Delete", id="web")
    await shim.ask("Delete", id="other")


async def test_a_vm_lost_right_after_create_is_an_exit(shim: Shim) -> None:
    await shim.create("first")
    life = FakeLife.lives[0]

    async def create(_request: Any) -> None:
        async def guest() -> None:
            raise RpcError(Code.UNAVAILABLE, "the VM has ended")

        life.guest = guest  # type: ignore[method-assign, assignment]

    shim.guest.on["CreateContainer"] = create
    await shim.create("web")
    with trio.fail_after(1):
        assert (await shim.ask("Wait", id="web")).exit_status == 255
    assert shim.events.names()[-2:] == ["TaskCreate web", "TaskExit web 255"]


async def test_a_guest_that_takes_no_sigkill_is_lost(
    shim: Shim, autojump_clock: trio.testing.MockClock
) -> None:
    await shim.create()
    await shim.ask("Start", id="web")
    shim.guest.on["SignalProcess"] = shim.guest.on["Check"] = Gate()
    before = trio.current_time()
    await shim.ask("Kill", id="web", signal=9)
    assert (await shim.ask("Wait", id="web")).exit_status == 255
    assert trio.current_time() - before < 8
    assert "SIGKILL" in shim.guest.reason
    await shim.ask("Delete", id="web")


async def test_another_signal_is_not_the_end_of_the_guest(
    shim: Shim, autojump_clock: trio.testing.MockClock
) -> None:
    await shim.create()
    await shim.ask("Start", id="web")
    shim.guest.on["SignalProcess"] = Gate()
    assert await shim.code("Kill", id="web", signal=15) == Code.DEADLINE_EXCEEDED
    assert not shim.guest.lost.is_set()


async def test_create_with_other_options_has_another_vm(shim: Shim) -> None:
    shim.bundle(".")
    shim.sandbox.start_early()
    await shim.create(options={"type_url": "other", "value": b"x"})
    assert len(FakeLife.lives) == 2
    assert not FakeLife.lives[0].is_running
    assert FakeLife.lives[1].is_running
    assert shim.events.names() == ["TaskCreate web"]


async def test_an_early_start_that_failed_is_told_once(shim: Shim, monkeypatch: Any) -> None:
    shim.bundle(".")

    def refuse_to_open() -> None:
        raise ShareError("no tmpfs")

    with monkeypatch.context() as patch:
        patch.setattr(shim.sandbox.share, "open", refuse_to_open)
        shim.sandbox.start_early()
    with pytest.raises(RpcError, match="no tmpfs"):
        await shim.create()
    assert FakeLife.lives == []
    await shim.create()
    assert shim.events.names() == ["TaskCreate web"]


class FakeDrives:
    """Attributes: released: ids of containers whose disks were unplugged."""

    written = False

    def __init__(self) -> None:
        self.released: list[str] = []

    async def release(self, holder: str) -> None:
        self.released.append(holder)


async def test_disks_are_unplugged_after_the_guest_has_forgotten(shim: Shim) -> None:
    await shim.create("first")
    drives = FakeDrives()
    FakeLife.lives[-1].drives = drives  # type: ignore[assignment]
    shim.guest.on["CreateContainer"] = refuse
    assert await shim.code("Create", "CreateTaskRequest", id="web", bundle=str(shim.bundle("web")))
    assert drives.released == ["web"], "of a Create that failed as well"
    del shim.guest.on["CreateContainer"]
    await shim.create("web")

    async def still_plugged(_request: Any) -> None:
        assert drives.released == ["web"]

    shim.guest.on["RemoveContainer"] = still_plugged
    await shim.ask("Delete", id="web")
    assert drives.released == ["web", "web"]
