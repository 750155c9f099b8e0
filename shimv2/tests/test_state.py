# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from shimv2 import state


@pytest.fixture(autouse=True)
def directories(tmp_path, monkeypatch):
    for name in ("SANDBOXES", "VMS", "SHARES"):
        monkeypatch.setattr(state, name, tmp_path / name.lower())
    return tmp_path


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def record(sandbox_id: str = "s1", namespace: str = "ns", socket_path: str = ""):
    return state.SandboxRecord(sandbox_id, namespace, "/run/c.sock", socket_path)


def test_a_record_survives_being_written_and_read(sleeper):
    state.claim(first := record())
    first.add_process("vmm", sleeper.pid)
    first.cgroups = ["/sys/fs/cgroup/x"]
    first.save()
    again = state.SandboxRecord.load("s1")
    assert again is not None
    assert vars(again) == vars(first)


def test_a_living_sandbox_keeps_its_id(sleeper):
    mine = record()
    mine.add_process("shim", sleeper.pid)
    state.claim(mine)
    with pytest.raises(state.SandboxInUseError, match="'ns'"):
        state.claim(record(namespace="other"))


def test_of_many_starts_of_one_id_at_once_one_has_it():
    def start(number: int) -> str:
        mine = record(namespace=f"ns{number}")
        mine.add_process("shim", os.getpid())
        gate.wait()
        try:
            state.claim(mine)
        except state.SandboxInUseError:
            return ""
        return mine.namespace

    gate = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            (owner,) = filter(None, pool.map(start, range(8)))
            found = state.SandboxRecord.load("s1")
            assert found is not None and found.namespace == owner
            state.remove_sandbox("s1", owner)


def test_a_sandbox_that_another_namespace_has_by_now_is_let_be(sleeper):
    """Its own `delete` comes late."""
    theirs = record(namespace="other")
    theirs.add_process("shim", sleeper.pid)
    state.claim(theirs)
    assert state.remove_sandbox("s1", "ns") == []
    assert sleeper.poll() is None
    assert state.SandboxRecord.load("s1") is not None


def test_what_can_t_be_cleared_is_named(monkeypatch):
    state.claim(record())
    monkeypatch.setattr(state, "_detach_mounts_below", lambda _: None)
    monkeypatch.setattr(Path, "rmdir", refuse := Mock(side_effect=PermissionError(1, "no")))
    with pytest.raises(OSError, match=r"/s1: no.*/s1'"):
        state.claim(record())
    assert refuse.called


def test_what_a_dead_shim_left_is_cleared_with_its_processes(sleeper):
    old = record()
    old.add_process("vmm", sleeper.pid)
    old.processes["shim"] = (sleeper.pid, 1)  # that pid belongs to another process now
    state.claim(old)
    state.vm_dir("s1").mkdir(parents=True)
    (state.vm_dir("s1") / "qmp.sock").touch()
    state.claim(record())
    assert sleeper.wait(5) == -9
    assert not state.vm_dir("s1").exists()


def test_a_recycled_pid_is_left_alone(sleeper):
    assert state.kill_processes({"vmm": (sleeper.pid, 1)}) == []
    assert sleeper.poll() is None


def test_our_own_process_is_never_killed():
    started = state.start_time(os.getpid())
    assert started is not None
    assert state.kill_processes({"shim": (os.getpid(), started)}) == []


def test_remove_sandbox_is_idempotent_and_complete(sleeper, directories):
    path = directories / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    mine = record(socket_path=str(path))
    mine.add_process("vmm", sleeper.pid)
    state.claim(mine)
    (state.share_dir("s1") / "shared").mkdir(parents=True)
    assert state.remove_sandbox("s1", "ns") == []
    assert state.remove_sandbox("s1", "ns") == []
    assert sleeper.wait(5) == -9
    assert not path.exists()
    assert not list((directories / "sandboxes").iterdir())
    assert not list((directories / "shares").iterdir())


def test_a_socket_somebody_listens_on_stays(directories):
    path = directories / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        state.remove_socket(str(path))
        assert path.exists()


def test_a_tree_is_removed_without_following_links(directories):
    outside = directories / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    tree = directories / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/link").symlink_to(outside)
    assert state.remove_tree(tree) == []
    assert not tree.exists()
    assert (outside / "kept").exists()


def test_a_broken_record_counts_as_none():
    state.sandbox_dir("s1").mkdir(parents=True)
    (state.sandbox_dir("s1") / "state.json").write_text("{")
    assert state.SandboxRecord.load("s1") is None


def test_a_full_disk_is_named_and_nothing_is_left(directories, isolated):
    from shimv2.mounts import mount

    def body():
        state.SANDBOXES.mkdir()
        mount("tmpfs", state.SANDBOXES, "tmpfs", data="nr_blocks=1")
        (state.SANDBOXES / "filler").write_bytes(bytes(4096))
        with pytest.raises(OSError, match=r"No space left on device: '.*/s1/state\.tmp'"):
            state.claim(record())
        assert os.listdir(state.SANDBOXES) == ["filler"]

    isolated(body)
