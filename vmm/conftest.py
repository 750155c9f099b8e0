# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the vmm tests: a VM whose PID 1 is a shell on the console."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from vmm.hypervisor import ConsoleDevice, Device, VmConfig
from vmm.qemu import Qemu

QEMU = Path(os.environ.get("PYKATA_TEST_QEMU", "/usr/bin/qemu-system-x86_64"))
GUEST = Path(__file__).parents[1] / "build" / "guest"

BOOT_TIMEOUT = 40.0
COMMAND_TIMEOUT = 20.0


class GuestShell:
    """The guest's shell behind the console socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""
        self.transcript = b""
        self._count = 0

    async def start(self) -> None:
        """Wait for the prompt and make the shell quiet."""
        with trio.fail_after(BOOT_TIMEOUT):
            await self.read_until(b"# ")
            await self.run("busybox stty -echo; PS1=; PATH=/usr/sbin:/usr/bin:/sbin:/bin")
            await self.run(
                "for fs in proc:proc sysfs:sys devtmpfs:dev tmpfs:mnt; do "
                "busybox mount -t ${fs%:*} x /${fs#*:}; done"
            )

    async def run(self, command: str, timeout: float = COMMAND_TIMEOUT) -> tuple[int, str]:
        """Run one line; returns its status and what it printed."""
        self._count += 1
        marker = f"@{self._count}@"
        # The marker is printed, not typed: an echo of the command does not contain it.
        line = f"{command}; busybox printf '%s%s%s\\n' @ '{self._count}@' $?\n"
        await self._stream.send_all(line.encode())
        with trio.fail_after(timeout):
            output = await self.read_until(marker.encode())
            status = await self.read_until(b"\n")
        return int(status), output.decode("utf-8", "replace").replace("\r", "").strip()

    async def read_until(self, marker: bytes) -> bytes:
        while marker not in self._buffer:
            data = await self._stream.receive_some()
            if not data:
                raise EOFError(f"console closed; it said: {self.transcript[-2000:]!r}")
            self.transcript += data
            self._buffer += data
        before, _, self._buffer = self._buffer.partition(marker)
        return before


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A short path (unix sockets end at 107 bytes) that must be gone after the test."""
    parent = Path(tempfile.mkdtemp(prefix="vmm-", dir="/tmp"))
    yield parent / "vm"
    left = [str(path) for path in parent.rglob("*")]
    shutil.rmtree(parent)
    assert not [path for path in left if path.startswith(str(parent / "vm"))], left


@pytest.fixture
def vm_config(state_dir: Path) -> VmConfig:
    kernel, image = GUEST / "vmlinux", GUEST / "kata-containers.img"
    if not (kernel.exists() and image.exists() and QEMU.exists()):
        pytest.skip("needs QEMU and the guest in build/guest")
    return VmConfig(
        id="test",
        state_dir=state_dir,
        binary=QEMU,
        kernel=kernel.resolve(),
        image=image.resolve(),
        kernel_params="init=/bin/sh",
        memory_mib=256,
        max_memory_mib=1024,
        max_vcpus=2,
    )


@asynccontextmanager
async def running_vm(
    config: VmConfig, *devices: Device, **changes: Any
) -> AsyncIterator[tuple[Qemu, GuestShell]]:
    """A started VM and its shell."""
    config = replace(config, **changes)
    console = ConsoleDevice("console0", config.state_dir / "console.sock")
    async with Qemu(config) as vm:
        await vm.prepare()
        for device in (console, *devices):
            await vm.add_device(device)
        async with await trio.open_unix_socket(str(console.socket)) as stream:
            await vm.start()
            shell = GuestShell(stream)
            await shell.start()
            yield vm, shell


@pytest.fixture
def boot() -> Any:
    return running_vm


@pytest.fixture
def shell_on() -> type[GuestShell]:
    return GuestShell
