# SPDX-License-Identifier: Apache-2.0
"""The built kernel and image boot: seen on the console of a VM."""

from __future__ import annotations

import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

GUEST = Path(__file__).resolve().parents[2] / "build/guest"
LIMIT = 60.0  # seconds; an idle machine needs two
QEMU = "qemu-system-x86_64"

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason="needs QEMU"),
    pytest.mark.skipif(not (GUEST / "vmlinux").exists(), reason="the guest is not built"),
]


class Console:
    """What a guest wrote so far, and its input."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.text = ""

    def expect(self, words: str) -> str:
        """Wait until the guest has written these words; returns what came before."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while words not in self.text:
                left = deadline - time.monotonic()
                assert left > 0, f"no {words!r} in {self.text!r}"
                if selector.select(left):
                    data = self._process.stdout.read1(65536)  # type: ignore[union-attr]
                    assert data, f"the VM ended: {self.text!r}"
                    self.text += data.decode(errors="replace")
        before, _, self.text = self.text.partition(words)
        return before

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def end(self) -> int:
        return self._process.wait(LIMIT)


@contextmanager
def guest(append: str, *extra: str) -> Iterator[Console]:
    drive = f"id=image,file={GUEST / 'kata-containers.img'},format=raw,if=none,readonly=on"
    process = subprocess.Popen(
        [
            *(QEMU, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
            *("-M", "q35,accel=tcg", "-cpu", "max", "-m", "512,slots=2,maxmem=2G"),
            *("-smp", "1,maxcpus=4"),
            *("-kernel", str(GUEST / "vmlinux")),
            *("-append", f"root=/dev/vda1 rootfstype=erofs ro console=hvc0 quiet {append}"),
            *("-drive", drive, "-device", "virtio-blk-pci,drive=image"),
            *("-device", "virtio-serial-pci", "-chardev", "stdio,id=console,signal=off"),
            *("-device", "virtconsole,chardev=console"),
            *extra,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield Console(process)
    finally:
        process.kill()
        process.communicate()


def test_the_agent_is_pid_1_and_listens() -> None:
    with guest("") as console:
        console.expect("listening")


def test_the_kernel_has_what_containers_need() -> None:
    questions = {
        "filesystems": "cat /proc/filesystems",
        "cgroups": "cat /proc/cgroups",
        "namespaces": "ls /proc/self/ns",
        "crun": "crun --version",
        "python": 'python3 -IS -c \'import sys; sys.path.append("/usr/lib/pykata"); '
        "from google.protobuf.internal import api_implementation as a; print(a.Type())'",
        "iptables": "iptables-save -V",
        "mkfs": "mkfs.ext4 -V 2>&1",
        "command line": "cat /proc/cmdline",
    }
    with guest("init=/bin/sh") as console:
        console.expect("#")
        console.send(
            "mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run; echo 'mounts' done"
        )
        console.expect("mounts done\r\n")
        answers = {}
        for name, question in questions.items():
            # Quoted, as the terminal echoes what is typed.
            console.send(f"{question}; echo 'end' of {name}")
            answers[name] = console.expect(f"end of {name}\r\n")
        console.send("poweroff -f")
        assert console.end() == 0
    for name in ("erofs", "ext4", "xfs", "overlay", "virtiofs", "squashfs", "tmpfs", "cgroup2"):
        assert f"\t{name}\r\n" in answers["filesystems"]
    for name in ("cpuset", "cpu", "memory", "pids", "freezer", "blkio", "devices", "hugetlb"):
        assert f"{name}\t" in answers["cgroups"]
    for name in ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"):
        assert name in answers["namespaces"].split()
    assert "+SECCOMP" in answers["crun"]
    assert "upb" in answers["python"]
    assert "iptables" in answers["iptables"]
    assert "1.4" in answers["mkfs"]
    assert "rcu_expedited=1" in answers["command line"]


def test_a_panic_ends_the_vm() -> None:
    with guest("init=/bin/sh") as console:
        console.expect("#")
        console.send("mount -t proc proc /proc; echo c > /proc/sysrq-trigger")
        assert console.end() == 0
