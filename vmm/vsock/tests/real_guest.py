# SPDX-License-Identifier: Apache-2.0
"""A real guest for tests and benchmarks: the project's kernel, and an initrd with one program
(guest_services.c)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNEL = HERE.parents[2] / "build" / "guest" / "vmlinux"
QEMU = "qemu-system-x86_64"
PERIOD = 1000003


def missing() -> str:
    """What this host lacks, or ""."""
    if not KERNEL.exists():
        return f"no guest kernel at {KERNEL}"
    for program in (QEMU, "gcc"):
        if shutil.which(program) is None:
            return f"no {program}"
    return ""


def pattern() -> bytes:
    """One period of what the guest sends and expects."""
    x, mask = 88172645463325252, (1 << 64) - 1
    data = bytearray()
    for _ in range(PERIOD):
        x ^= (x << 13) & mask
        x ^= x >> 7
        x ^= (x << 17) & mask
        data.append((x >> 32) & 0xFF)
    return bytes(data)


def make_initrd(directory: Path) -> Path:
    """A cpio archive (newc) with /init and /dev/console."""
    init = directory / "init"
    subprocess.run(
        ["gcc", "-static", "-O2", "-o", init, HERE / "guest_services.c"], check=True, timeout=60
    )
    archive = bytearray()

    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08x" % n for n in numbers))
        archive.extend(name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(data)
        archive.extend(bytes(-len(archive) % 4))

    entry("dev", 0o040755)
    entry("dev/console", 0o020600, device=(5, 1))
    entry("init", 0o100755, init.read_bytes())
    entry("TRAILER!!!", 0)
    initrd = directory / "initrd"
    initrd.write_bytes(archive)
    return initrd


@contextmanager
def running_guest(
    socket: Path, initrd: Path, *, memory_mib: int = 256, extra: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU with a vhost-user-vsock device at `socket`; its console goes to stdout's pipe."""
    command = [
        QEMU,
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-M", "q35,accel=tcg,memory-backend=ram", "-cpu", "max,-erms", "-smp", "1"),
        *("-m", f"{memory_mib}M,slots=10,maxmem=4G"),
        *("-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on"),
        *("-kernel", str(KERNEL), "-initrd", str(initrd)),
        *("-append", "console=hvc0 quiet panic=1"),
        *("-device", "virtio-serial-pci,romfile=", "-chardev", "stdio,id=console,signal=off"),
        *("-device", "virtconsole,chardev=console"),
        *("-chardev", f"socket,id=vsock,path={socket}"),
        *("-device", "vhost-user-vsock-pci,chardev=vsock,romfile="),
        *extra,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
