# SPDX-License-Identifier: Apache-2.0
"""The VM cache's own part: what a failing VM, a peer or a second cache does to it."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shimv2.cgroups import CgroupError
from shimv2.config import Config, load_config
from shimv2.factory import service, templates
from shimv2.factory.service import Cache, Pooled, prefix_of, serve
from shimv2.factory.templates import Templates
from vmm.errors import VmmError, VmmGoneError
from vmm.template.handover import HandoverError, status


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "configuration.toml"
    file.write_text("[hypervisor.qemu]\n")
    config = load_config(file)
    factory = dataclasses.replace(
        config.factory,
        vm_cache_number=1,
        vm_cache_endpoint=str(tmp_path / "cache.sock"),
        template_path=str(tmp_path / "templates"),
        enable_template=True,
        template_autocreate=True,
    )
    return dataclasses.replace(config, factory=factory)


def test_two_caches_have_vms_of_different_names(config: Config) -> None:
    other = dataclasses.replace(config.factory, vm_cache_endpoint="/run/other.sock")
    first, second = prefix_of(config), prefix_of(dataclasses.replace(config, factory=other))
    assert not first.startswith(second)
    assert not second.startswith(first)
    assert next(Cache(config)._names).startswith(first)


async def test_a_vm_that_fails_is_not_the_end_of_the_cache(
    config: Config, monkeypatch: Any, autojump_clock: trio.testing.MockClock
) -> None:
    cache = Cache(config)
    tries: list[str] = []

    async def fill() -> None:
        await cache._nursery.start(cache._keep, f"vm-{len(tries)}")

    async def keep_one(name: str, *, task_status: trio.TaskStatus[None]) -> None:
        tries.append(name)
        if len(tries) == 1:
            raise CgroupError("no room before it is ready")
        cache._ready.append(Pooled(name, object(), 0.0))  # type: ignore[arg-type]
        task_status.started()
        raise CgroupError("its cgroup can't be removed")

    monkeypatch.setattr(cache, "_fill", fill)
    monkeypatch.setattr(cache, "_keep_one", keep_one)
    async with trio.open_nursery() as nursery:
        await nursery.start(cache.run)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert len(tries) == 2


async def test_requests_that_fail_leave_a_cache_that_answers(
    config: Config, monkeypatch: Any, autojump_clock: trio.testing.MockClock
) -> None:
    cache = Cache(config)
    rows: list[Any] = []

    def rows_or_error() -> list[Any]:
        if not rows:
            rows.append({})
            raise VmmGoneError("it has just ended")
        return []

    monkeypatch.setattr(cache, "status", rows_or_error)
    path = config.factory.vm_cache_endpoint
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        await listener.bind(path)
        listener.listen(4)
        accept, refusals = listener.accept, [OSError(errno.EMFILE, "too many")]

        class Short:
            async def accept(self) -> Any:
                if refusals:
                    raise refusals.pop()
                return await accept()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, cache, Short())
            with pytest.raises(HandoverError, match="just ended"):
                await status(path)
            assert (await status(path))["pid"] == os.getpid()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cache", ["absent", "slow", "another version"])
async def test_a_cache_that_gives_none_is_done_without(
    config: Config, monkeypatch: Any, autojump_clock: trio.testing.MockClock, cache: str
) -> None:
    async def key(_config: Config) -> str:
        return "a" * 64

    monkeypatch.setattr(templates, "template_key", key)
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        if cache != "absent":
            await listener.bind(config.factory.vm_cache_endpoint)
            listener.listen(1)
        async with trio.open_nursery() as nursery:
            if cache == "another version":
                nursery.start_soon(_answer, listener, b'{"protocol": 2}')
            before = trio.current_time()
            assert not await Templates(config).take(object(), "box")  # type: ignore[arg-type]
            assert trio.current_time() - before < 3
            nursery.cancel_scope.cancel()


async def _answer(listener: Any, answer: bytes) -> None:
    peer, _ = await listener.accept()
    with peer:
        await peer.recv(65536)
        await peer.send(answer)


async def test_a_template_that_cannot_be_made_is_nothing_to_the_sandbox(
    config: Config, monkeypatch: Any
) -> None:
    async def start_maker(_config: Config, _mounts: int) -> None:
        raise RuntimeError("no fork")

    monkeypatch.setattr(templates, "start_maker", start_maker)
    found = Templates(config)
    found._key = "a" * 64
    await found.make_beside(-1)
    monkeypatch.setattr(found._store, "is_wanted", lambda _key: 1 / 0)
    await found.make_beside(-1)


async def test_starting_a_maker_keeps_no_descriptor(config: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(templates, "_MAKER", "pass  # {lib}")
    await trio.lowlevel.checkpoint()
    before = sorted(os.listdir("/proc/self/fd"))
    fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    try:
        await templates.start_maker(config, fd)
    finally:
        os.close(fd)
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_a_lock_that_was_taken_away_is_no_lock(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "cache.sock"

    def flock(_lock: Any, _how: int) -> None:
        path.with_suffix(".lock").unlink()

    monkeypatch.setattr(service.fcntl, "flock", flock)
    with pytest.raises(VmmError, match="just ending"):
        async with service._listener(path):
            pass
