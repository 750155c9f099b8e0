# SPDX-License-Identifier: Apache-2.0
"""Hooks as real programs, also seen from another mount namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from shimv2 import namespaces
from shimv2.hooks import ContainerState, HookError, run_hooks
from shimv2.spec import Hook, HookKind


@pytest.fixture
def state(tmp_path: Path) -> ContainerState:
    return ContainerState(
        id="web",
        pid=4711,
        bundle=tmp_path,
        oci_version="1.1.0",
        annotations={"a": "b"},
        netns="/run/netns/x",
    )


def shell(script: str, *, timeout: int | None = None, env: list[str] | None = None) -> Hook:
    return Hook("/bin/sh", ["sh", "-c", script], env or [], timeout)


async def test_a_hook_gets_the_state_its_environment_and_nothing_else(
    tmp_path: Path, state: ContainerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "must not leak")
    leak = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leak, True)
    hook = shell(
        "cat > state; /usr/bin/env > env; pwd > cwd; ls /proc/self/fd > fds; ps -o pgid= $$ > pgid",
        env=["A=1", "B=x=y", "PATH=/bin:/usr/bin"],
    )
    await run_hooks(HookKind.CREATE_RUNTIME, [hook], state, mount_namespace=None)
    os.close(leak)
    assert json.loads((tmp_path / "state").read_text()) == {
        "ociVersion": "1.1.0",
        "id": "web",
        "status": "creating",
        "pid": 4711,
        "bundle": str(tmp_path),
        "annotations": {"a": "b", "nerdctl/network-namespace": "/run/netns/x"},
    }
    env = set((tmp_path / "env").read_text().split())
    assert env - {"PWD=" + str(tmp_path), "_=/usr/bin/env", "SHLVL=0", "OLDPWD"} == {
        "A=1",
        "B=x=y",
        "PATH=/bin:/usr/bin",
    }
    assert (tmp_path / "cwd").read_text().strip() == str(tmp_path)
    assert (tmp_path / "fds").read_text().split()[:3] == ["0", "1", "2"]
    assert len((tmp_path / "fds").read_text().split()) == 4  # and the directory itself
    assert int((tmp_path / "pgid").read_text()) != os.getpgid(0)


async def test_the_status_says_when(tmp_path: Path, state: ContainerState) -> None:
    for kind, status in ((HookKind.POSTSTART, "running"), (HookKind.POSTSTOP, "stopped")):
        await run_hooks(kind, [shell("cat > state")], state, mount_namespace=None)
        seen = json.loads((tmp_path / "state").read_text())
        assert seen["status"] == status
        assert ("pid" in seen) == (status != "stopped")


async def test_a_failing_create_runtime_says_why_and_stops_the_rest(
    tmp_path: Path, state: ContainerState
) -> None:
    hooks = [
        shell("echo first; echo no such bridge >&2; exit 7"),
        shell("touch second"),
    ]
    with pytest.raises(HookError) as caught:
        await run_hooks(HookKind.CREATE_RUNTIME, hooks, state, mount_namespace=None)
    text = str(caught.value)
    assert "createRuntime hook 0 (/bin/sh) of web" in text
    assert "status 7: first / no such bridge" in text
    assert not (tmp_path / "second").exists()


async def test_a_failing_poststop_is_logged_and_the_rest_runs(
    tmp_path: Path, state: ContainerState, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = [shell("exit 1"), Hook("/no/such", ["x"], [], None), shell("touch third")]
    await run_hooks(HookKind.POSTSTOP, hooks, state, mount_namespace=None)
    assert (tmp_path / "third").exists()
    assert "poststop hook 0" in caplog.text
    assert "No such file" in caplog.text


async def test_a_timeout_kills_the_whole_group(tmp_path: Path, state: ContainerState) -> None:
    hook = shell("echo hanging; sleep 1000 & echo $! > child; wait", timeout=1)
    with trio.fail_after(10), pytest.raises(HookError, match="within 1 s, killed: hanging"):
        await run_hooks(HookKind.PRESTART, [hook], state, mount_namespace=None)
    child = int((tmp_path / "child").read_text())
    await _gone(child)


async def test_cancelling_kills_it_too(tmp_path: Path, state: ContainerState) -> None:
    with trio.move_on_after(0.5) as scope:
        hook = shell("echo $$ > pid; exec sleep 1000")
        await run_hooks(HookKind.PRESTART, [hook], state, mount_namespace=None)
    assert scope.cancelled_caught
    await _gone(int((tmp_path / "pid").read_text()))


async def test_a_daemon_it_leaves_does_not_hold_us(tmp_path: Path, state: ContainerState) -> None:
    with trio.fail_after(10):
        hook = shell("setsid sleep 1000 & echo $! > pid")
        await run_hooks(HookKind.PRESTART, [hook], state, mount_namespace=None)
    os.kill(int((tmp_path / "pid").read_text()), 9)


async def test_much_output_is_no_problem(state: ContainerState) -> None:
    with trio.fail_after(20), pytest.raises(HookError) as caught:
        hook = shell("head -c 5000000 /dev/zero | tr '\\0' x; echo; echo the end; exit 1")
        await run_hooks(HookKind.PRESTART, [hook], state, mount_namespace=None)
    assert str(caught.value).endswith("the end")
    assert len(str(caught.value)) < 5000


def test_it_runs_in_the_hosts_mount_namespace(tmp_path: Path) -> None:
    script = f"""
import os, trio
from pathlib import Path
from shimv2 import mounts, namespaces
from shimv2.hooks import ContainerState, run_hooks
from shimv2.spec import Hook, HookKind
host = namespaces.enter_own_mount_namespace()
Path({str(tmp_path)!r}, "m").mkdir()
mounts.mount("t", {str(tmp_path / "m")!r}, "tmpfs")
state = ContainerState(id="web", pid=1, bundle=Path({str(tmp_path)!r}))
hook = Hook("/bin/sh", ["sh", "-c", "readlink /proc/self/ns/mnt > ns; touch m/by-hook"], [], None)
trio.run(lambda: run_hooks(HookKind.PRESTART, [hook], state, mount_namespace=host))
assert os.listdir({str(tmp_path / "m")!r}) == []
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert (tmp_path / "m" / "by-hook").exists()
    assert (tmp_path / "ns").read_text().strip() == os.readlink("/proc/self/ns/mnt")
    assert namespaces.is_host_network("/proc/self/ns/net")


async def _gone(pid: int) -> None:
    """The process ends soon (it may be nobody's but init's to reap)."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(fd)
    os.close(fd)
