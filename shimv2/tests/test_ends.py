# SPDX-License-Identifier: Apache-2.0
"""How containers end when something else ends first, or tells nonsense."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shimv2 import container as container_module
from shimv2.hooks import HookError
from shimv2.spec import Hook, HookKind
from shimv2.tests.fakes import FakeLife, Shim, shim_of
from ttrpc.errors import Code, RpcError


@pytest.fixture
async def shim(tmp_path: Path, monkeypatch: Any) -> AsyncIterator[Shim]:
    async with shim_of(tmp_path, monkeypatch) as shim:
        yield shim


class Hooks:
    """In place of hooks that run.

    Attributes:
        ran: their kinds in order, those without a hook left out.
        fails: the kind whose hook fails.
    """

    def __init__(self) -> None:
        self.ran: list[HookKind] = []
        self.fails: HookKind | None = None

    async def run(self, kind: HookKind, hooks: Sequence[Hook], *_: Any, **__: Any) -> None:
        if hooks:
            self.ran.append(kind)
        if hooks and kind is self.fails:
            raise HookError(f"{kind.value} hook failed")


@pytest.fixture
def hooks(monkeypatch: Any) -> Hooks:
    hooks = Hooks()
    monkeypatch.setattr(container_module, "run_hooks", hooks.run)
    return hooks


def with_hooks(shim: Shim, *kinds: HookKind) -> Path:
    bundle = shim.bundle("web")
    file = bundle / "config.json"
    spec = json.loads(file.read_text())
    spec["hooks"] = {kind.value: [{"path": "/bin/true"}] for kind in kinds}
    file.write_text(json.dumps(spec))
    return bundle


async def refuse(_request: Any) -> None:
    raise RpcError(Code.INTERNAL, "refused")


async def test_what_the_first_hooks_set_up_the_last_ones_take_away(
    shim: Shim, hooks: Hooks
) -> None:
    bundle = with_hooks(shim, HookKind.CREATE_RUNTIME, HookKind.POSTSTOP)
    await shim.create("first")
    shim.guest.on["CreateContainer"] = refuse
    with pytest.raises(RpcError, match="refused"):
        await shim.create("web", bundle=bundle)
    assert hooks.ran == [HookKind.CREATE_RUNTIME, HookKind.POSTSTOP]
    assert "RemoveContainer" in shim.guest.calls


async def test_a_hook_that_failed_has_its_poststop_too(shim: Shim, hooks: Hooks) -> None:
    bundle = with_hooks(shim, HookKind.PRESTART, HookKind.CREATE_RUNTIME, HookKind.POSTSTOP)
    await shim.create("first")
    hooks.fails = HookKind.PRESTART
    with pytest.raises(RpcError, match="prestart hook failed"):
        await shim.create("web", bundle=bundle)
    assert hooks.ran == [HookKind.PRESTART, HookKind.POSTSTOP]
    assert shim.guest.calls.count("CreateContainer") == 1, "the first one's alone"


async def test_no_poststop_without_a_first_hook(shim: Shim, hooks: Hooks, monkeypatch: Any) -> None:
    bundle = with_hooks(shim, HookKind.CREATE_RUNTIME, HookKind.POSTSTOP)

    def refuse_rootfs(*_: Any) -> Path:
        raise RpcError(Code.INTERNAL, "no share")

    monkeypatch.setattr(shim.sandbox.share, "add_rootfs", refuse_rootfs)
    with pytest.raises(RpcError, match="no share"):
        await shim.create("web", bundle=bundle)
    assert hooks.ran == []


async def test_a_poststop_that_fails_does_not_hide_why(shim: Shim, hooks: Hooks) -> None:
    bundle = with_hooks(shim, HookKind.CREATE_RUNTIME, HookKind.POSTSTOP)
    await shim.create("first")
    shim.guest.on["CreateContainer"] = refuse
    hooks.fails = HookKind.POSTSTOP
    with pytest.raises(RpcError, match="refused"):
        await shim.create("web", bundle=bundle)


async def test_a_vm_lost_in_the_moment_of_start(shim: Shim) -> None:
    await shim.create()

    async def lose(_request: Any) -> None:
        shim.guest.declare_lost("killed")
        await trio.sleep_forever()

    shim.guest.on["StartContainer"] = lose
    assert await shim.code("Start", id="web") == Code.UNAVAILABLE
    with trio.fail_after(1):
        assert (await shim.ask("Wait", id="web")).exit_status == 255
    assert shim.events.names() == ["TaskCreate web", "TaskExit web 255"], "and no TaskStart"
    await shim.ask("Delete", id="web")


async def test_a_vm_lost_after_the_guest_started_it(shim: Shim) -> None:
    """The guest's answer is in, the loss as well: it did not run for anybody."""
    await shim.create()

    async def lose(_request: Any) -> None:
        shim.sandbox.containers["web"].guest_lost()

    shim.guest.on["StartContainer"] = lose
    assert await shim.code("Start", id="web") == Code.UNAVAILABLE
    assert shim.events.names() == ["TaskCreate web", "TaskExit web 255"]


@pytest.mark.parametrize("status", [256, 1 << 31, -1])
async def test_a_status_that_no_process_has_counts_as_lost(shim: Shim, status: int) -> None:
    await shim.create()
    await shim.ask("Start", id="web")
    shim.guest.end("web", status=status)
    with trio.fail_after(1):
        assert (await shim.ask("Wait", id="web")).exit_status == 255
    assert shim.events.names()[-1] == "TaskExit web 255"


async def test_oom_events_are_limited_and_of_our_containers(
    shim: Shim, autojump_clock: trio.testing.MockClock
) -> None:
    await shim.create()
    told = iter(["web", "somebody-else", "../web"] * 1000)

    async def next_oom() -> str:
        await trio.lowlevel.checkpoint()
        return next(told)

    shim.guest.next_oom = next_oom  # type: ignore[attr-defined]
    with trio.move_on_after(3):
        await shim.sandbox.watch_oom(shim.guest)  # type: ignore[arg-type]
    events = [name for name in shim.events.names() if name.startswith("TaskOOM")]
    assert set(events) == {"TaskOOM web"}
    assert 9 <= len(events) <= 11, "ten a second are asked for, a third of them ours"


async def test_a_lost_guest_ends_the_watch_for_oom(shim: Shim) -> None:
    await shim.create()

    async def next_oom() -> str:
        raise RpcError(Code.UNAVAILABLE, "the guest is lost")

    shim.guest.next_oom = next_oom  # type: ignore[attr-defined]
    with trio.fail_after(1):
        await shim.sandbox.watch_oom(shim.guest)  # type: ignore[arg-type]


async def test_an_ended_task_has_no_statistics(shim: Shim) -> None:
    await shim.create()
    await shim.ask("Start", id="web")
    shim.guest.end("web")
    await shim.ask("Wait", id="web")
    assert await shim.code("Stats", id="web") == Code.NOT_FOUND
    assert "StatsContainer" not in shim.guest.calls
    await shim.ask("Delete", id="web")
    assert await shim.code("Stats", id="web") == Code.NOT_FOUND


async def test_shutdown_is_answered_when_containerd_has_the_events(shim: Shim) -> None:
    """It kills what is left of the shim then."""
    await shim.create()
    await shim.ask("Start", id="web")
    await shim.ask("Shutdown", id="other")
    assert shim.events.flushed == 0, "one still lives"
    shim.guest.declare_lost("killed")
    await shim.ask("Wait", id="web")
    await shim.ask("Delete", id="web")
    await shim.ask("Shutdown", id="web")
    assert shim.events.names()[-2:] == ["TaskExit web 255", "TaskDelete web"]
    assert shim.events.flushed == len(shim.events.published)


async def test_shutdown_of_what_lives_tells_its_exit_first(shim: Shim) -> None:
    await shim.create()
    await shim.ask("Start", id="web")
    await shim.ask("Shutdown", id="web")
    assert shim.events.names()[-1] == "TaskExit web 255"
    assert shim.events.flushed == len(shim.events.published)


class Sizes:
    """In place of a VM's sizing; attributes: those that count, and how often it shrank."""

    def __init__(self) -> None:
        self.counted: set[str] = set()
        self.shrunk = 0

    async def add(self, container_id: str, _resources: Any) -> None:
        self.counted.add(container_id)

    def forget(self, container_id: str) -> None:
        self.counted.discard(container_id)

    async def shrink(self) -> None:
        self.shrunk += 1


@pytest.mark.parametrize("method", ["CreateContainer", "RemoveContainer"])
async def test_what_was_not_created_takes_no_room(shim: Shim, method: str) -> None:
    """Whether the guest knows of it or not."""
    await shim.create("first")
    sizes = FakeLife.lives[0].sizing = Sizes()  # type: ignore[assignment]
    shim.guest.on["CreateContainer"] = shim.guest.on[method] = refuse
    assert await shim.code("Create", "CreateTaskRequest", id="web", bundle=str(shim.bundle("web")))
    assert sizes.counted == set()
    assert sizes.shrunk == 1


async def test_what_is_deleted_takes_no_room(shim: Shim) -> None:
    await shim.create("first")
    sizes = FakeLife.lives[0].sizing = Sizes()  # type: ignore[assignment]
    await shim.create("web")
    assert sizes.counted == {"web"}
    await shim.ask("Delete", id="web")
    assert sizes.counted == set()
    assert sizes.shrunk == 1
