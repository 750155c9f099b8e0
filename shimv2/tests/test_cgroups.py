# SPDX-License-Identifier: Apache-2.0
"""Cgroups: paths and mount tables by themselves, the rest on the cgroups of this host."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimv2 import cgroups

V1 = """\
24 18 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro
25 24 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
26 24 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
27 24 0:25 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
28 24 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
"""
V2 = "30 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/default/web", "/default/kata_web"),
        ("default/web", "/default/kata_web"),
        ("/web", "/kata_web"),
        ("", "/kata_vc/sid"),
        ("/", "/kata_vc/sid"),
        ("/kubepods/burstable/pod1/abc", "/kubepods/burstable/pod1/kata_abc"),
        ("system.slice:cri:abc", "/system.slice/cri-abc.scope"),
        ("a-b-c.slice:cri:abc", "/a.slice/a-b.slice/a-b-c.slice/cri-abc.scope"),
        ("-.slice:cri:abc", "/cri-abc.scope"),
        (":cri:abc", "/system.slice/cri-abc.scope"),
    ],
)
def test_paths(given: str, path: str) -> None:
    assert cgroups.sandbox_path(given, "sid") == path


def test_mount_tables() -> None:
    v1 = cgroups.hierarchies(V1)
    assert [str(h.root) for h in v1] == ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"]
    assert not any(h.is_v2 for h in v1)
    (v2,) = cgroups.hierarchies(V2)
    assert v2.is_v2
    assert str(v2.root) == "/sys/fs/cgroup"
    assert cgroups.hierarchies("") == []


def all_cgroups() -> set[str]:
    roots = [h.root for h in cgroups.hierarchies()] + _unified()
    return {path for root in roots for path, _, _ in os.walk(root)}


def _unified() -> list[Path]:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return [Path(line.split()[4]) for line in table if " - cgroup2 " in line]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
pytestmark = needs_root


@pytest.fixture
def sandbox_id() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    left = sorted((path for path in all_cgroups() if name in path), key=len, reverse=True)
    for path in left:
        cgroups.remove(Path(path))
    assert not left


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    script = "input(); data = bytearray(b'x') * 4000000; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


def use_memory(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    process.stdout.readline()


def join(process: subprocess.Popen[bytes], groups: cgroups.SandboxCgroups) -> None:
    for file in groups.procs_files():
        file.write_text(str(process.pid))


def test_all_in_one_cgroup_below_the_pods(sandbox_id: str, sleeper) -> None:
    groups = cgroups.SandboxCgroups(sandbox_id, f"/pod-{sandbox_id}/web", sandbox_only=True)
    groups.create()
    join(sleeper, groups)
    use_memory(sleeper)
    files = groups.procs_files()
    assert len(files) == len(cgroups.hierarchies())
    assert all(file.parent.name == "kata_web" for file in files)
    assert f"/pod-{sandbox_id}/kata_web" in Path(f"/proc/{sleeper.pid}/cgroup").read_text()
    assert groups.stats().memory_bytes > 1_000_000
    assert groups.stats().processes == 1
    sleeper.kill()
    sleeper.wait()
    assert groups.delete() == []


def test_overhead_apart_and_only_vcpu_threads_with_the_pod(sandbox_id: str, sleeper) -> None:
    groups = cgroups.SandboxCgroups(sandbox_id, f"/pod-{sandbox_id}/web", sandbox_only=False)
    groups.create()
    join(sleeper, groups)
    groups.add_vcpu_threads([sleeper.pid, 2**22 - 1])
    where = dict(
        line.split(":", 2)[1:] for line in Path(f"/proc/{sleeper.pid}/cgroup").read_text().split()
    )
    if not cgroups.hierarchies()[0].is_v2:
        assert where["memory"] == f"/kata_overhead/{sandbox_id}"
        assert where["cpu"] == f"/pod-{sandbox_id}/kata_web"
    sleeper.kill()
    sleeper.wait()
    assert groups.delete() == []
    left = all_cgroups()  # other sandboxes of this host may live
    parents = {path for path in left if path.endswith("/kata_overhead")}
    assert all(any(path.startswith(f"{parent}/") for path in left) for parent in parents)


@pytest.mark.skipif(not _unified(), reason="no hierarchy of version 2 is mounted")
def test_below_a_unit_of_systemd_there_is_one_level_more(sandbox_id: str, sleeper) -> None:
    root = _unified()[0]
    found = [cgroups.Hierarchy(root, frozenset())]
    scope = f"test.slice/cri-{sandbox_id}.scope"
    for path, expected in (
        (f"test.slice:cri:{sandbox_id}", f"{scope}/sandbox"),
        (f"/test.slice/{sandbox_id}", f"test.slice/kata_{sandbox_id}/sandbox"),
        (f"/{sandbox_id}/web", f"{sandbox_id}/kata_web"),
    ):
        groups = cgroups.SandboxCgroups(sandbox_id, path, sandbox_only=True, found=found)
        groups.create()
        join(sleeper, groups)
        assert Path(f"/proc/{sleeper.pid}/cgroup").read_text().splitlines()[-1] == f"0::/{expected}"
        assert groups.directories == [root / expected]
        assert groups.delete() == []
        assert not (root / scope).exists()


def test_a_process_left_in_is_moved_out(sandbox_id: str, sleeper) -> None:
    groups = cgroups.SandboxCgroups(sandbox_id, "", sandbox_only=True)
    groups.create()
    join(sleeper, groups)
    assert groups.delete() == []
    assert sleeper.poll() is None
    assert sandbox_id not in Path(f"/proc/{sleeper.pid}/cgroup").read_text()


def test_a_process_that_just_ended_is_waited_for(sandbox_id: str, sleeper) -> None:
    groups = cgroups.SandboxCgroups(sandbox_id, "", sandbox_only=True)
    groups.create()
    join(sleeper, groups)
    sleeper.kill()  # not reaped: it may still be in there
    assert groups.delete() == []


def test_the_shim_goes_in_and_comes_back(sandbox_id: str) -> None:
    script = f"""
from pathlib import Path
from shimv2.cgroups import SandboxCgroups
before = Path("/proc/self/cgroup").read_text()
groups = SandboxCgroups({sandbox_id!r}, "", sandbox_only=True)
groups.create()
groups.add_shim()
assert "/kata_vc/{sandbox_id}" in Path("/proc/self/cgroup").read_text()
assert groups.delete() == []
after = Path("/proc/self/cgroup").read_text()
assert after == before, (before, after)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_two_sandboxes_share_a_parent(sandbox_id: str) -> None:
    parent = f"/ns-{sandbox_id}"
    one = cgroups.SandboxCgroups("one", f"{parent}/one", sandbox_only=True)
    two = cgroups.SandboxCgroups("two", f"{parent}/two", sandbox_only=True)
    one.create()
    two.create()
    assert one.delete() == []
    assert all(directory.is_dir() for directory in two.directories)
    assert two.delete() == []


def test_a_parent_of_the_engines_stays(sandbox_id: str) -> None:
    parents = [h.root / f"pod-{sandbox_id}" for h in cgroups.hierarchies()]
    for parent in parents:
        parent.mkdir()
    try:
        groups = cgroups.SandboxCgroups("s", f"/pod-{sandbox_id}/web", sandbox_only=True)
        groups.create()
        assert groups.delete() == []
        assert all(parent.is_dir() for parent in parents)
    finally:
        for parent in parents:
            parent.rmdir()


def test_removal_from_outside(sandbox_id: str, sleeper) -> None:
    groups = cgroups.SandboxCgroups(sandbox_id, "", sandbox_only=False)
    groups.create()
    join(sleeper, groups)
    for directory in groups.directories:
        assert cgroups.remove(directory) == ""
        assert cgroups.remove(directory) == ""


def test_cpuset(sandbox_id: str) -> None:
    groups = cgroups.SandboxCgroups(sandbox_id, "", sandbox_only=True)
    groups.create()
    try:
        if any("cpuset" in h.controllers for h in cgroups.hierarchies()):
            groups.set_cpuset("0", "0")
            with pytest.raises(cgroups.CgroupError, match=r"cpuset\.cpus = '9999'"):
                groups.set_cpuset("9999")
    finally:
        assert groups.delete() == []


def test_what_cannot_be_made_is_named_and_undone(sandbox_id: str, tmp_path: Path) -> None:
    good = cgroups.hierarchies()[0]
    bad = cgroups.Hierarchy(tmp_path / "none", frozenset({"cpu"}))
    groups = cgroups.SandboxCgroups(sandbox_id, "", sandbox_only=True, found=[good, bad])
    with pytest.raises(cgroups.CgroupError, match=str(tmp_path)):
        groups.create()
