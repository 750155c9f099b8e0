# SPDX-License-Identifier: Apache-2.0
"""What an OCI spec asks for: hooks on the host and in the guest, security, bad values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from integration.lib.bundles import spec, unpack_busybox, write
from integration.lib.containerd import RUNTIME
from integration.lib.kata import Kata, Result


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_busybox(tmp_path_factory.mktemp("bundle"))


class Runner:
    """Runs containers from specs."""

    def __init__(self, kata: Kata, rootfs: Path, directory: Path) -> None:
        self.kata = kata
        self.rootfs = rootfs
        self.directory = directory

    def run(self, *command: str, check: bool = True, **changes: Any) -> Result:
        config = write(self.directory / "config.json", spec(self.rootfs, *command, **changes))
        return self.kata.ctr(
            *("run", "--rm", "--runtime", RUNTIME, "--config", config, self.kata.new_id()),
            check=check,
        )


@pytest.fixture
def runner(kata: Kata, rootfs: Path, tmp_path: Path) -> Runner:
    return Runner(kata, rootfs, tmp_path)


class TestHooks:
    def hook(self, directory: Path, name: str, script: str) -> dict[str, Any]:
        path = directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return {"path": str(path), "args": [name, "argument"], "env": ["A=b"], "timeout": 5}

    def test_they_run_on_the_host_in_order(self, runner: Runner, tmp_path: Path) -> None:
        log = tmp_path / "log"
        hooks = {
            kind: [
                self.hook(
                    tmp_path, kind, f"cat > {tmp_path}/{kind}.json; echo {kind} $1 $A >> {log}"
                )
            ]
            for kind in ("prestart", "createRuntime", "poststart", "poststop")
        }
        runner.run("true", hooks=hooks, annotations={"my": "annotation"})
        lines = log.read_text().splitlines()
        assert lines == [f"{kind} argument b" for kind in hooks]
        state = json.loads((tmp_path / "createRuntime.json").read_text())
        assert state["status"] == "creating"
        assert state["pid"] > 1
        assert state["annotations"]["my"] == "annotation"
        assert state["annotations"]["nerdctl/network-namespace"].startswith("/proc/")
        assert json.loads((tmp_path / "poststop.json").read_text())["status"] == "stopped"

    def test_they_see_the_host_s_mounts_and_the_pod_s_network(
        self, runner: Runner, tmp_path: Path
    ) -> None:
        script = (
            f"readlink /proc/self/ns/mnt > {tmp_path}/mnt;"
            " pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/');"
            f" readlink /proc/$pid/ns/net > {tmp_path}/net"
        )
        runner.run("true", hooks={"createRuntime": [self.hook(tmp_path, "hook", script)]})
        assert (tmp_path / "mnt").read_text().strip() == str(Path("/proc/self/ns/mnt").readlink())
        assert (tmp_path / "net").read_text().strip() != str(Path("/proc/self/ns/net").readlink())

    def test_a_failing_one_fails_create(self, runner: Runner, tmp_path: Path) -> None:
        hook = self.hook(tmp_path, "failing", "echo because >&2; exit 3")
        done = runner.run("true", hooks={"createRuntime": [hook]}, check=False)
        assert done.returncode != 0
        assert "failing" in done.stderr
        assert "because" in done.stderr

    def test_a_slow_one_is_ended(self, runner: Runner, tmp_path: Path) -> None:
        hook = self.hook(tmp_path, "slow", "sleep 1000") | {"timeout": 1}
        done = runner.run("true", hooks={"prestart": [hook]}, check=False)
        assert done.returncode != 0
        assert "slow" in done.stderr

    def test_guest_hooks_run_in_the_guest(self, runner: Runner) -> None:
        # createContainer: a program of the guest's image; startContainer: one of the container's.
        script = (
            r"s=$(cat); s=${s#*\"bundle\":\"}; id=${s%%\"*}; id=${id##*/}; "
            "uname -r > /run/kata-containers/shared/containers/$id/rootfs/created"
        )
        created = {"path": "/bin/sh", "args": ["sh", "-c", script]}
        started = {"path": "/bin/busybox", "args": ["sh", "-c", "uname -r > /started"]}
        done = runner.run(
            *("sh", "-c", "cat /created /started; uname -r"),
            hooks={"createContainer": [created], "startContainer": [started]},
        )
        releases = done.stdout.split()
        assert len(releases) == 3
        assert set(releases) == {releases[-1]}

    @pytest.mark.parametrize("kind", ["createContainer", "startContainer"])
    @pytest.mark.one_edition
    def test_a_failing_guest_hook_fails_the_start(self, runner: Runner, kind: str) -> None:
        hook = {"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}
        done = runner.run("echo", "ran", hooks={kind: [hook]}, check=False)
        assert done.returncode != 0
        assert "hook" in done.stderr
        assert "ran" not in done.stdout


class TestSecurity:
    def test_capabilities_user_and_groups(self, runner: Runner) -> None:
        process = {"user": {"uid": 1000, "gid": 100, "additionalGids": [7, 8]}}
        out = runner.run("sh", "-c", "id; grep CapBnd /proc/self/status", process=process).stdout
        assert "uid=1000(user) gid=100(users) groups=7,8\n" in out
        assert out.split()[-1] == f"{1 << 0 | 1 << 5 | 1 << 10:016x}"

    def test_read_only_root_masked_and_read_only_paths(self, runner: Runner) -> None:
        linux = {"maskedPaths": ["/proc/interrupts"], "readonlyPaths": ["/proc/sys"]}
        script = "echo x > /new; echo 1 > /proc/sys/kernel/panic; wc -c < /proc/interrupts"
        root = {"path": str(runner.rootfs), "readonly": True}
        done = runner.run("sh", "-c", script, linux=linux, root=root, check=False)
        assert done.stderr.count("Read-only file system") == 2
        assert done.stdout.strip() == "0"

    def test_no_new_privileges_and_rlimits(self, runner: Runner) -> None:
        process = {
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}],
        }
        script = "grep NoNewPrivs /proc/self/status; ulimit -Sn; ulimit -Hn"
        assert runner.run("sh", "-c", script, process=process).stdout.split() == [
            "NoNewPrivs:",
            "1",
            "123",
            "456",
        ]

    def test_seccomp(self, runner: Runner) -> None:
        seccomp = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
            ],
        }
        done = runner.run("mkdir", "/refused", linux={"seccomp": seccomp}, check=False)
        assert done.returncode != 0
        assert "No space left" in done.stderr

    def test_sysctls_of_the_pod(self, runner: Runner) -> None:
        sysctl = {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}
        script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced"
        assert runner.run("sh", "-c", script, linux={"sysctl": sysctl}).stdout.split() == ["1", "1"]

    def test_hostname(self, runner: Runner) -> None:
        assert runner.run("hostname", hostname="somewhere").stdout.strip() == "somewhere"

    def test_stdio_can_be_opened_again_by_its_user(self, runner: Runner) -> None:
        process = {"user": {"uid": 1000, "gid": 100}}
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ]
        done = runner.run("sh", "-c", "echo again > /dev/stdout", process=process, mounts=mounts)
        assert done.stdout == "again\n"


class TestBadSpecs:
    @pytest.mark.parametrize(
        ("changes", "needle"),
        [
            ({"process": {"args": []}}, "process.args"),
            ({"process": {"cwd": "relative"}}, "process.cwd"),
            ({"root": {"path": "/nonesuch/rootfs"}}, "/nonesuch/rootfs"),
            ({"linux": {"sysctl": {"net.nonesuch": "1"}}}, "net.nonesuch"),
            ({"mounts": [{"destination": "relative", "type": "tmpfs"}]}, "relative"),
            ({"annotations": {"io.katacontainers.config.hypervisor.path": "/bin/sh"}}, "path"),
            ({"annotations": {"io.kubernetes.cri.container-type": "nonsense"}}, "nonsense"),
        ],
    )
    def test_the_error_names_the_field(
        self, runner: Runner, changes: dict[str, Any], needle: str
    ) -> None:
        done = runner.run("true", check=False, **changes)
        assert done.returncode != 0
        assert needle in done.stderr
