# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error that names the thing, in time, and nothing left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from integration.lib.configuration import installed
from integration.lib.containerd import RUNTIME
from integration.lib.images import BUSYBOX_REFERENCE
from integration.lib.kata import Kata, wait_until
from integration.lib.leftovers import left_by
from shimv2.api import task_v2_pb2
from ttrpc.client import Client
from ttrpc.errors import Code, RpcError


def run_with(kata: Kata, config: Path, *command: str) -> str:
    """`ctr run` with a configuration of its own; must fail; returns stderr."""
    done = kata.run(
        *(command or ("true",)),
        flags=("--runtime-config-path", config),
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    return done.stderr


@pytest.fixture
def configuration(prefix: Path, tmp_path: Path):
    """A function that writes the installed configuration with one line replaced."""
    base = installed(prefix).read_text()

    def write(key: str, value: str) -> Path:
        lines = base.splitlines()
        at = next(n for n, line in enumerate(lines) if line.lstrip("# ").startswith(f"{key} ="))
        lines[at] = f"{key} = {value}"
        path = tmp_path / "configuration.toml"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.mark.parametrize(
    ("key", "value", "needle"),
    [
        ("kernel", '"/nonesuch/vmlinux"', "/nonesuch/vmlinux"),
        ("image", '"/nonesuch.img"', "/nonesuch.img"),
        ("path", '"/nonesuch/qemu"', "/nonesuch/qemu"),
        ("virtio_fs_daemon", '"/nonesuch/virtiofsd"', "/nonesuch/virtiofsd"),
        ("default_memory", '"much"', "default_memory"),
        ("default_memory", "99999999999", "default_memory"),
        ("default_vcpus", "[]", "default_vcpus"),
        ("kernel", '"relative/vmlinux"', "relative/vmlinux"),
        ("kernel", '"/etc"', "/etc"),
        ("image", '"/etc"', "/etc"),
        ("path", '"/etc/hostname"', "/etc/hostname"),
    ],
)
def test_configuration(kata: Kata, configuration, key: str, value: str, needle: str) -> None:
    assert needle in run_with(kata, configuration(key, value))


def test_broken_toml(kata: Kata, tmp_path: Path) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text("[hypervisor.qemu\n")
    assert str(path) in run_with(kata, path)


@pytest.mark.parametrize("path", ["/nonesuch.toml", "/etc"])
def test_a_configuration_that_can_t_be_read(kata: Kata, path: str) -> None:
    assert path in run_with(kata, Path(path))


def test_a_program_that_does_not_exist(kata: Kata) -> None:
    done = kata.run("/nonesuch", check=False)
    assert done.returncode != 0
    assert "/nonesuch" in done.stderr


def test_a_mount_whose_source_is_missing(kata: Kata) -> None:
    done = kata.run(
        "true",
        flags=("--mount", "type=bind,src=/nonesuch,dst=/mnt,options=rbind:ro"),
        check=False,
    )
    assert done.returncode != 0
    assert "/nonesuch" in done.stderr


def test_a_failed_container_can_be_followed_by_a_good_one(kata: Kata) -> None:
    container_id = kata.new_id()
    assert kata.run("/nonesuch", container_id=container_id, check=False).returncode != 0
    kata.remove(container_id)
    assert kata.run("true", container_id=container_id).returncode == 0


def test_an_id_in_use(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    done = kata.ctr(
        *("run", "-d", "--runtime", RUNTIME, BUSYBOX_REFERENCE, container_id, "true"), check=False
    )
    assert done.returncode != 0
    assert kata.status(container_id) == "RUNNING"


def test_the_same_id_in_another_namespace_is_refused_and_harms_nobody(kata: Kata) -> None:
    container_id = kata.start("sleep", "1000")
    other = Kata(kata.containerd, namespace="other")
    other.containerd.import_image(_image(), namespace="other")
    done = other.run("true", container_id=container_id, check=False)
    assert done.returncode != 0
    assert container_id in done.stderr
    assert kata.status(container_id) == "RUNNING"
    assert kata.execute(container_id, "echo", "alive").stdout == "alive\n"
    other.close()


@pytest.mark.one_edition
@pytest.mark.parametrize(
    ("text", "needle"),
    [
        (b"{", "line 1"),
        (b"[]", "must be an object"),
        (b'{"ociVersion": "1.0.2", "process": {"args": "sh"}}', "process.args"),
        (None, "config.json: No such file"),
    ],
)
async def test_a_bundle_with_a_broken_config(
    kata: Kata, prefix: Path, tmp_path: Path, text: bytes | None, needle: str
) -> None:
    """No engine writes one, so the shim is asked as an engine would."""
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    name = kata.new_id()
    shim = prefix / "bin/containerd-shim-kata-v2"
    words = ("-namespace", "default", "-id", name, "-address", "/run/nonesuch.sock")
    started = await trio.run_process([shim, *words, "start"], cwd=tmp_path, capture_stdout=True)
    address = started.stdout.decode().strip().removeprefix("unix://")
    async with Client(await trio.open_unix_socket(address)) as client:
        task = client.stub(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])
        with pytest.raises(RpcError) as caught:
            await task.Create(
                task_v2_pb2.CreateTaskRequest(id=name, bundle=str(tmp_path)), timeout=10
            )
        await task.Shutdown(task_v2_pb2.ShutdownRequest(id=name), timeout=10)
    wait_until(lambda: not left_by(name), 10, "the shim is gone")
    assert needle in caught.value.message
    assert caught.value.code == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("filled", ["", "echo >/run/vc/filler;"], ids=["soon", "at-once"])
@pytest.mark.one_edition
def test_a_start_without_room_for_its_record(
    kata: Kata, prefix: Path, tmp_path: Path, filled: str
) -> None:
    """A /run that gets full: one page is there, for the first record or not even for that."""
    name = kata.new_id()
    shim = prefix / "bin/containerd-shim-kata-v2"
    words = f"-namespace default -id {name} -address /run/nonesuch.sock start"
    script = f"mount -t tmpfs -o nr_blocks=1 tmpfs /run/vc; {filled} exec {shim} {words}"
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"/run/vc/sbs/{name}/state.tmp: No space left on device" in done.stderr
    assert not done.stdout
    assert not left_by(name)


def _image() -> Path:
    from integration.lib.images import busybox_image

    return busybox_image()
