# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.template import TemplateBusyError, TemplateStore
from vmm.template.store import KEEP, KEEP_UNUSED, RETRY_AFTER

KEY = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates")


def make(store: TemplateStore, key: str = KEY, files: tuple[Path, ...] = ()) -> None:
    with store.make(key) as making:
        (making.directory / "state").write_bytes(b"device state of " + key.encode())
        with (making.directory / "memory").open("wb") as memory:
            memory.write(b"kernel")
            memory.truncate(1 << 20)
        making.publish({"kernel": "/vmlinux"}, files)


def found(store: TemplateStore, key: str = KEY) -> bool:
    with store.find(key) as template:
        return template is not None


def names(store: TemplateStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def test_a_template_is_found_whole(store: TemplateStore) -> None:
    assert not found(store)
    make(store)
    with store.find(KEY) as template:
        assert template is not None
        assert (template.directory / "memory").stat().st_size == 1 << 20
        assert template.about["kernel"] == "/vmlinux"
    assert not found(store, OTHER)
    assert names(store) == [KEY]


def test_one_that_is_not_published_is_gone(store: TemplateStore) -> None:
    with pytest.raises(ValueError, match="broke"), store.make(KEY) as making:
        (making.directory / "memory").write_bytes(b"half")
        raise ValueError("it broke")
    assert names(store) == [f"{KEY}.failed"]
    assert not found(store)
    (entry,) = store.status()
    assert (entry.state, entry.detail) == ("failed", "it broke")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("memory", lambda path: os.truncate(path, 4096)),
        ("memory", os.unlink),
        ("state", lambda path: path.write_bytes(b"device state of somebody else")),
        ("state", lambda path: os.truncate(path, 3)),
        ("state", os.unlink),
        ("template.json", lambda path: path.write_text("{")),
        ("template.json", lambda path: path.write_text("[]")),
        ("template.json", lambda path: path.write_text('{"format": 1}')),
        ("template.json", os.unlink),
    ],
)
def test_damage_is_noticed(
    store: TemplateStore, name: str, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    make(store)
    damage(store.root / KEY / name)  # type: ignore[operator]
    assert [entry.state for entry in store.status()] == ["damaged"]
    assert not found(store)
    assert "damaged" in caplog.text
    assert names(store) == []


def test_a_template_of_another_key_does_not_count(store: TemplateStore) -> None:
    make(store, OTHER)
    (store.root / OTHER).rename(store.root / KEY)
    assert not found(store)


def test_one_that_is_removed_while_in_use_stays_one_thing(store: TemplateStore) -> None:
    make(store)
    with store.find(KEY) as template:
        assert template is not None
        with (template.directory / "memory").open("rb") as memory:
            make(store)  # replaced
            assert memory.read(6) == b"kernel"
        with pytest.raises(FileNotFoundError):
            (template.directory / "state").read_bytes()
    assert found(store)


def test_one_maker_at_a_time(store: TemplateStore) -> None:
    assert store.is_wanted(KEY)
    with store.make(KEY) as making:
        assert not store.is_wanted(KEY)
        with pytest.raises(TemplateBusyError), store.make(KEY):
            pass
        (entry,) = store.status()
        assert (entry.state, entry.pid) == ("being made", os.getpid())
        with store.make(OTHER):
            pass
        assert making.directory.exists(), "the loser took nothing away"
    assert names(store) == []


def test_a_failure_is_not_repeated_at_once(store: TemplateStore) -> None:
    with pytest.raises(ValueError), store.make(KEY):
        raise ValueError("no")
    assert not store.is_wanted(KEY)
    note = store.root / f"{KEY}.failed"
    long_ago = time.time() - RETRY_AFTER - 1
    os.utime(note, (long_ago, long_ago))
    assert store.is_wanted(KEY)
    clock_was_ahead = time.time() + 1e6
    os.utime(note, (clock_was_ahead, clock_was_ahead))
    assert store.is_wanted(KEY)
    make(store)
    assert names(store) == [KEY]


def test_space_is_bounded(store: TemplateStore) -> None:
    keys = [f"{number:064x}" for number in range(KEEP + 3)]
    for age, key in enumerate(reversed(keys)):
        make(store, key)
        when = time.time() - age
        os.utime(store.root / key, (when, when))
    store.tidy(keep=keys[0])
    # The most recently used ones, and the one that is kept in any case.
    assert names(store) == sorted([keys[0], *keys[-(KEEP - 1) :]])


def test_unused_and_stale_ones_go(store: TemplateStore, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"old")
    make(store, KEY, (kernel,))
    make(store, OTHER, ())
    store.tidy()
    assert names(store) == [KEY, OTHER]
    kernel.write_bytes(b"new")
    store.tidy()
    assert names(store) == [OTHER]
    long_ago = time.time() - KEEP_UNUSED - 60
    os.utime(store.root / OTHER, (long_ago, long_ago))
    store.tidy()
    assert names(store) == []


def test_use_counts(store: TemplateStore) -> None:
    make(store)
    os.utime(store.root / KEY, (1, 1))
    assert found(store)
    assert time.time() - (store.root / KEY).stat().st_mtime < 60


_MAKER = """
import signal, sys, time
sys.path.insert(0, {tree!r})
from pathlib import Path
from vmm.template import TemplateStore
{setup}
with TemplateStore(Path({root!r})).make({key!r}) as making:
    (making.directory / "memory").write_bytes(b"half")
    print("at it", flush=True)
    while True:
        time.sleep(60)
"""


def maker(store: TemplateStore, setup: str = "") -> subprocess.Popen[str]:
    tree = str(Path(__file__).parents[3])
    code = _MAKER.format(tree=tree, root=str(store.root), key=KEY, setup=setup)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at it\n"
    return process


@pytest.fixture
def reaped() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes, each reaped as soon as it ends, as init would."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_killed_maker_leaves_nothing_that_stays(
    store: TemplateStore, reaped: list[subprocess.Popen[str]]
) -> None:
    reaped.append(maker(store))
    reaped[0].send_signal(signal.SIGKILL)
    reaped[0].wait()
    assert not found(store)
    assert store.is_wanted(KEY)
    store.tidy()
    assert names(store) == []


@pytest.mark.parametrize(
    "setup", ["", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"], ids=["dies", "cleans"]
)
def test_destroy_ends_makers(
    store: TemplateStore, reaped: list[subprocess.Popen[str]], setup: str
) -> None:
    make(store, OTHER)
    process = maker(store, setup)
    reaped.append(process)
    threading.Thread(target=process.wait, daemon=True).start()
    assert store.destroy() == [process.pid]
    assert process.wait(10) in (0, -signal.SIGTERM)
    assert not store.root.exists()
    assert store.destroy() == []


def test_keys_are_no_paths(store: TemplateStore) -> None:
    with pytest.raises(ValueError, match="no key"), store.find("../../etc"):
        pass


def test_about_is_for_people_too(store: TemplateStore) -> None:
    make(store)
    about = json.loads((store.root / KEY / "template.json").read_text())
    assert about["memory_bytes"] == 1 << 20
    assert len(about["state_sha256"]) == 64
