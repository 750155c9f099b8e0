# SPDX-License-Identifier: Apache-2.0
"""A real nursery, whose shims tell what they have become instead of serving a sandbox."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shimv2.ready import hand_over, likeness
from shimv2.ready.nursery import UPDATED

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the nursery serves root only")

_LIMIT = 20  # seconds, on a busy host
_PR_SET_THP_DISABLE = 41
_PER_LINUX32 = 0x8
_NURSERY = """
import json, os, signal, socket, sys
import shimv2.state
shimv2.state.READY_SHIMS = sys.argv[1]
from shimv2 import cli
from shimv2.ready import likeness, nursery

def tell(args, params, listener, recorded):
    if not os.read(recorded, 1):
        os._exit(1)
    with listener.accept()[0] as peer:
        peer.send(json.dumps({
            "id": args.id,
            "options": params.options.decode("latin-1"),
            "inherited": likeness.inherited(),
            "cmdline": os.fsdecode(open("/proc/self/cmdline", "rb").read()).rstrip("\\0").split("\\0"),
            "passed on": [fd for fd in (listener.fileno(), recorded) if os.get_inheritable(fd)],
            "child": int(signal.getsignal(signal.SIGCHLD)),
            "pid": os.getpid(),
        }).encode())
    os._exit(0)

def fork(real=os.fork):
    if os.path.exists(sys.argv[1] + ".no-fork"):
        raise BlockingIOError("no process left")
    return real()

def code(real=likeness.code):
    return [] if os.path.exists(sys.argv[1] + ".updated") else real()

cli.serve = tell
os.fork = fork
likeness.code = code
sys.exit(nursery.main(likeness.code()))
"""


class Nursery:
    """Attributes: directory: where its socket lies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stderr = directory.with_name("stderr")
        self._read = 0
        with self._stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                # It ignores a signal that `start` does not.
                ["nohup", sys.executable, "-c", _NURSERY, directory, "x" * 400],
                stdin=subprocess.PIPE,
                stderr=stderr,
            )

    def wait_ready(self) -> None:
        while not Path(hand_over.socket_path()).exists():
            assert self.process.poll() is None, self.said()
            select.select([], [], [], 0.01)

    def said(self) -> str:
        """What it wrote since this was asked last."""
        text = self._stderr.read_text()
        new, self._read = text[self._read :], len(text)
        return new

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(_LIMIT)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a nursery of the test's own."""
    monkeypatch.setattr(hand_over, "READY_SHIMS", str(tmp_path / "ready"))
    return tmp_path / "ready"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "ready")
    yield nursery
    nursery.end()


@pytest.fixture
def nursery(shared: Nursery, monkeypatch: pytest.MonkeyPatch) -> Nursery:
    monkeypatch.setattr(hand_over, "READY_SHIMS", str(shared.directory))
    shared.wait_ready()
    shared.said()
    return shared


class Start:
    """The part of `start` that asks."""

    def __init__(self, directory: Path) -> None:
        self.address = directory / "shim.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.address))
        self.listener.listen()
        self._records: list[int] = []

    def ask(self, stdin: bytes = b"", bundle: str = "") -> int:
        argv = ["-namespace", "ns", "-id", "web", *(["-bundle", bundle] if bundle else ()), "start"]
        pid, record = hand_over.ready_shim(argv, stdin, self.listener)
        if pid:
            self._records.append(record)
        return pid

    def told(self) -> dict[str, Any]:
        """By the shim that was asked for last."""
        os.write(self._records[-1], b"1")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_LIMIT)
            client.connect(str(self.address))
            found: dict[str, Any] = json.loads(client.recv(1 << 20))
            return found

    def close(self) -> None:
        self.listener.close()
        for fd in self._records:
            os.close(fd)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    start = Start(tmp_path)
    yield start
    start.close()


def gone(pid: int) -> None:
    fd = os.pidfd_open(pid)
    try:
        assert select.select([fd], [], [], _LIMIT)[0]
    finally:
        os.close(fd)


def in_a_child(body: Callable[[], None]) -> None:
    """Run where what `body` does to its process harms no other test."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_it_is_as_start_would_have_made_it(nursery, start: Start, tmp_path: Path) -> None:
    def body() -> None:
        os.chdir(tmp_path)
        os.umask(0o27)
        os.nice(3)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR2})
        os.environ["ONLY_HERE"] = "yes"
        os.environ.pop("HOME", None)
        os.environb[b"NOT_UTF8"] = b"\xff"
        expected = likeness.inherited()
        pid = start.ask(b"\xff options", bundle="\udcff")
        assert pid > 0, nursery.said()
        told = start.told()
        assert told["pid"] == pid
        assert told["id"] == "web"
        assert told["options"].encode("latin-1") == b"\xff options"
        assert told["inherited"] == json.loads(json.dumps(expected))
        assert told["cmdline"] == [
            *(
                "containerd-shim-kata-v2",
                "-namespace",
                "ns",
                "-id",
                "web",
                "-bundle",
                "\udcff",
                "start",
            )
        ]
        assert told["passed on"] == []
        assert told["child"] == signal.SIG_DFL

    in_a_child(body)


def test_each_start_gets_another_and_the_nursery_reaps_them(nursery, start: Start) -> None:
    pids = set()
    for _ in range(3):
        pids.add(start.ask())
        assert start.told()["pid"] in pids
    assert len(pids) == 3
    children = Path(f"/proc/{nursery.process.pid}/task/{nursery.process.pid}/children")
    for pid in pids:
        if Path(f"/proc/{pid}").exists():
            gone(pid)
    assert not children.read_text()


def test_a_cgroup_of_start_is_its_own_too(nursery, start: Start) -> None:
    root = next(
        path
        for path in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
        if (path / "cgroup.procs").exists()
    )
    group = root / f"pykata-test-{os.getpid()}"
    group.mkdir()

    def body() -> None:
        (group / "cgroup.procs").write_text("0")
        pid = start.ask()
        assert pid > 0, nursery.said()
        assert group.name in start.told()["inherited"]["cgroups"]
        gone_or_never(pid)

    def gone_or_never(pid: int) -> None:
        if Path(f"/proc/{pid}").exists():
            gone(pid)

    try:
        in_a_child(body)
    finally:
        group.rmdir()


def test_a_shim_that_nobody_records_ends(nursery, tmp_path: Path) -> None:
    start = Start(tmp_path)
    pid = start.ask()
    fd = os.pidfd_open(pid)
    start.close()
    assert select.select([fd], [], [], _LIMIT)[0]
    os.close(fd)


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("code", ["/elsewhere", 1, 2, "python", "3"], "another version"),
        ("fixed", {**likeness.fixed(), "CapEff": "0"}, "CapEff: '0' of `start`"),
        ("fixed", {**likeness.fixed(), "net namespace": "net:[1]"}, "net namespace"),
        ("inherited", {**likeness.inherited(), "directory": "/no/such"}, "/no/such"),
        ("inherited", {**likeness.inherited(), "cgroups": "0::/no/such"}, "/no/such"),
        ("inherited", {**likeness.inherited(), "cgroups": "1:none:/"}, "'none'"),
        ("inherited", {}, "cgroups"),
    ],
)
def test_where_it_can_t_be_alike_there_is_none(
    nursery, start: Start, monkeypatch, what: str, value: object, said: str
) -> None:
    path = hand_over.socket_path()
    monkeypatch.setattr(hand_over, "socket_path", lambda: path)
    with monkeypatch.context() as patched:
        patched.setattr(likeness, what, lambda: value)
        assert start.ask() == 0
    assert said in nursery.said()
    assert start.ask() > 0
    start.told()


def _schedule_as_batch() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _have_slack() -> None:
    Path("/proc/self/timerslack_ns").write_text("60000")


def _have_full_dumps() -> None:
    Path("/proc/self/coredump_filter").write_text("0x7f")


def _have_no_huge_pages() -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0


def _be_32_bit() -> None:
    assert ctypes.CDLL(None).personality(_PER_LINUX32) >= 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_schedule_as_batch, "scheduling"),
        (_have_slack, "timerslack_ns"),
        (_have_full_dumps, "coredump_filter"),
        (_have_no_huge_pages, "THP_enabled"),
        (_be_32_bit, "personality"),
    ],
)
def test_what_hardly_ever_differs(
    nursery, start: Start, change: Callable[[], None], said: str
) -> None:
    def body() -> None:
        change()
        assert start.ask() == 0

    in_a_child(body)
    assert said in nursery.said()


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"x" * (hand_over.MAX_MESSAGE // 2)])
def test_junk_harms_nobody(nursery, start: Start, junk: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(hand_over.socket_path())
        if junk:
            peer.send(junk)
            peer.settimeout(_LIMIT)
            assert peer.recv(100) == hand_over.HERE
            assert peer.recv(100) == b""
    assert start.ask() > 0
    start.told()


def test_the_nursery_ends_with_its_stdin_and_its_shims_do_not(
    directory: Path, start: Start
) -> None:
    nursery = Nursery(directory)
    nursery.wait_ready()
    assert start.ask() > 0
    assert nursery.end() == 0
    assert not directory.exists()
    assert start.told()["id"] == "web"
    assert start.ask() == 0


def test_a_nursery_that_is_told_to_end_leaves_nothing(directory: Path) -> None:
    nursery = Nursery(directory)
    nursery.wait_ready()
    nursery.process.terminate()
    nursery.process.wait(_LIMIT)
    assert not directory.exists()
    assert nursery.said() == ""
    nursery.end()


def test_a_nursery_whose_files_are_others_now_makes_room(directory: Path, start: Start) -> None:
    with_old = Nursery(directory)
    with_old.wait_ready()
    assert start.ask() > 0
    directory.with_suffix(".updated").touch()
    assert start.ask() == 0
    assert with_old.process.wait(_LIMIT) == UPDATED
    assert not directory.exists()
    assert start.told()["id"] == "web"


def test_a_nursery_that_is_killed_has_a_successor_at_once(directory: Path, start: Start) -> None:
    """Also while a shim of it waits for its record."""
    nursery = Nursery(directory)
    nursery.wait_ready()
    assert start.ask() > 0
    nursery.process.kill()
    nursery.end()
    successor = Nursery(directory)
    while not start.ask():
        assert successor.process.poll() is None, successor.said()
        select.select([], [], [], 0.01)
    start.told()
    successor.end()


def test_a_nursery_without_descriptors_waits_for_one(nursery, start: Start, monkeypatch) -> None:
    pid = nursery.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    with monkeypatch.context() as patched:
        patched.setattr(hand_over, "ANSWER_LIMIT", 0.3)
        assert start.ask() == 0
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert start.ask() > 0
    start.told()
    assert 1 <= nursery.said().count("Too many open files") < 20


def test_a_nursery_that_can_t_fork_goes_on(nursery, start: Start) -> None:
    obstacle = nursery.directory.with_name(nursery.directory.name + ".no-fork")
    obstacle.touch()
    assert start.ask() == 0
    assert "no process left" in nursery.said()
    obstacle.unlink()
    assert start.ask() > 0
    start.told()


def test_a_second_nursery_leaves_the_first_alone(nursery, start: Start) -> None:
    second = Nursery(nursery.directory)
    assert second.process.wait(_LIMIT) == 0
    assert start.ask() > 0
    start.told()


@pytest.fixture
def silent(directory: Path, monkeypatch) -> Iterator[socket.socket]:
    """What a nursery listens on that doesn't answer."""
    monkeypatch.setattr(hand_over, "ANSWER_LIMIT", 0.1)
    path = hand_over.socket_path()
    Path(path).parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(path)
        silent.listen()
        yield silent


def test_a_nursery_that_is_stopped_gets_no_descriptors(silent, start: Start) -> None:
    """Else the shim's socket would be listened on after the end of the shim."""
    assert start.ask() == 0
    peer, _ = silent.accept()
    with peer:
        assert peer.recv(1) == b""


def test_a_shim_that_comes_too_late_is_never_on_record(silent, start: Start) -> None:
    """Whatever `start` does by itself meanwhile."""
    found: list[int] = []

    def serve() -> None:
        peer, _ = silent.accept()
        with peer:
            peer.send(hand_over.HERE)
            _, descriptors = hand_over.receive(peer)
            found.extend(descriptors)
            peer.settimeout(_LIMIT)
            peer.recv(1)  # `start` gives up

    thread = threading.Thread(target=serve)
    thread.start()
    assert start.ask() == 0
    thread.join()
    listener, recorded = found
    assert select.select([recorded], [], [], _LIMIT)[0]
    assert os.read(recorded, 1) == b""
    for fd in (listener, recorded):
        os.close(fd)


def test_a_socket_that_nobody_listens_on(silent, start: Start) -> None:
    silent.close()
    assert start.ask() == 0
