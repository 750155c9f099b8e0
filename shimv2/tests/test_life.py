# SPDX-License-Identifier: Apache-2.0
"""The end of a VM whose guest may have in its memory what its disks do not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from shimv2.life import Life
from shimv2.tests.fakes import FakeGuest
from ttrpc.errors import Code, RpcError


def life_with(guest: FakeGuest, *, written: bool) -> Any:
    """A life that is up; the end of its VM is the test's to tell."""
    life: Any = Life(None, None)  # type: ignore[arg-type]
    life._guest = guest
    life.drives = SimpleNamespace(written=written)
    return life


@pytest.mark.parametrize(("written", "calls"), [(True, ["DestroySandbox"]), (False, [])])
async def test_disks_are_unmounted_before_the_vm_ends(
    written: bool, calls: list[str], nursery: trio.Nursery
) -> None:
    guest = FakeGuest()
    life = life_with(guest, written=written)
    done = trio.Event()

    async def unmount(_request: Any) -> None:
        assert not life.is_running, "nobody begins anything with it"
        assert not life._stop.is_set(), "the VM is still there"
        await done.wait()

    guest.on["DestroySandbox"] = unmount
    nursery.start_soon(life.stop)
    nursery.start_soon(life.stop)  # who comes second cuts nothing short
    await trio.testing.wait_all_tasks_blocked()
    assert life.was_stopped
    done.set()
    await trio.testing.wait_all_tasks_blocked()
    assert life._stop.is_set()
    assert guest.calls == calls
    life._ended.set()


async def test_a_guest_that_can_not_unmount_ends_all_the_same(nursery: trio.Nursery) -> None:
    guest = FakeGuest()

    async def refuse(_request: Any) -> None:
        raise RpcError(Code.INTERNAL, "busy")

    guest.on["DestroySandbox"] = refuse
    life = life_with(guest, written=True)
    nursery.start_soon(life.stop)
    await trio.testing.wait_all_tasks_blocked()
    assert life._stop.is_set()
    life._ended.set()
