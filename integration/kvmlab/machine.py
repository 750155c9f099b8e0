# SPDX-License-Identifier: Apache-2.0
"""The lab machine: QEMU with an emulated CPU that has SVM, and commands run in it.

::

    with Lab(disk, product, directory) as lab:
        status = lab.run(["uname", "-r"], output=sys.stdout.buffer)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from integration.kvmlab import wire
from integration.kvmlab.disk import Disk

QEMU = "qemu-system-x86_64"
CPUS = 2
MEMORY_MIB = 4096
# Translated code of the lab's kernel, of its QEMUs and of what runs under its KVM.
TCG_BUFFER_MIB = 512
BOOT_LIMIT = 240.0
# With ERMS kernels copy by `rep movsb`, which TCG executes byte by byte; of XSAVE a nested guest's
# kernel finds the sizes inconsistent, and without it Linux must not see what needs it.
# Four levels of page tables are fewer to walk, nested ones above all.
CPU = "max,-la57,-erms,-xsave,-avx,-avx2,-fma,-f16c,-vaes,-vpclmulqdq,+svm,+npt"
_KERNEL_PARAMETERS = (
    "root=/dev/vda rootfstype=ext4 console=ttyS0 loglevel=4 mitigations=off nokaslr "
    "systemd.show_status=false systemd.unified_cgroup_hierarchy=1 net.ifnames=0 "
    "tsc=reliable panic=-1"
)

Sink = Callable[[bytes], object]


class LabError(Exception):
    """The machine does not boot, went away, or is over its time."""


class Lab:
    """A running lab machine; what it writes is gone with it.

    Args:
        product: the read-only second disk.
        directory: for its console log and socket.
        limit: seconds after which it counts as hung and every call raises.
    """

    def __init__(
        self, disk: Disk, product: Path, directory: Path, *, limit: float = 3600.0
    ) -> None:
        self._disk = disk
        self._product = product
        self._directory = directory
        self._end = time.monotonic() + limit
        self._reader = wire.Reader()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self.kernel = ""

    @property
    def console(self) -> Path:
        """What the lab's kernel and systemd write."""
        return self._directory / "console.log"

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "lab.sock"
        path.unlink(missing_ok=True)
        # Ends with us, whatever happens; with less weight than anything else that runs.
        launcher = ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "10"]
        self._process = subprocess.Popen(
            [*launcher, *self._command(path)], stdin=subprocess.DEVNULL
        )
        try:
            self.attach(self._connect(path))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def attach(self, channel: socket.socket) -> None:
        """Take the channel to the lab, and wait until somebody serves it there.

        Raises:
            LabError: nobody does; with the console's last lines.
        """
        self._socket = channel
        end = time.monotonic() + BOOT_LIMIT
        while not self.kernel:
            for kind, body in self._receive(end):
                if kind == wire.HELLO:
                    self.kernel = body.decode()
            self._check(end, "no word from its system")

    def close(self) -> None:
        """End the machine as if by its plug."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        (self._directory / "lab.sock").unlink(missing_ok=True)

    def run(
        self,
        argv: list[str],
        *,
        environment: dict[str, str] | None = None,
        directory: str = "/root",
        output: BinaryIO | None = None,
        errors: BinaryIO | None = None,
        limit: float = 600.0,
    ) -> int:
        """Run a command with an empty stdin; its output goes on as it comes (default: to ours).

        Returns:
            Its exit status, negative for a signal; -9 also if it took longer than `limit`.

        Raises:
            LabError: the machine is gone or hangs.
        """
        self._start(argv, environment or {}, directory, terminal=False)
        self._send(wire.INPUT)
        sinks = {
            wire.OUTPUT: output or sys.stdout.buffer,
            wire.ERRORS: errors or output or sys.stderr.buffer,
        }
        end = time.monotonic() + limit
        killed = False
        while True:
            for kind, body in self._receive(min(end, self._end)):
                if kind == wire.EXIT:
                    status: int = wire.STATUS.unpack(body)[0]
                    return status
                sinks[kind].write(body)
                sinks[kind].flush()
            if time.monotonic() > end:
                if killed:
                    raise LabError(f"{argv[0]} could not be killed in the lab")
                self._send(wire.KILL)
                killed = True
                end += 60

    def shell(self, argv: list[str], environment: dict[str, str]) -> int:
        """The same on this terminal, until the command ends."""
        from integration.kvmlab.terminal import Terminal

        self._start(argv, environment, "/root", terminal=True)
        assert self._socket is not None
        with Terminal() as terminal:
            self._send(wire.SIZE, wire.WINDOW.pack(*terminal.size()))
            while True:
                typed, resized = terminal.wait(self._socket)
                if resized:
                    self._send(wire.SIZE, wire.WINDOW.pack(*terminal.size()))
                if typed:
                    self._send(wire.INPUT, typed)
                for kind, body in self._receive(time.monotonic()):
                    if kind == wire.EXIT:
                        status: int = wire.STATUS.unpack(body)[0]
                        return status
                    terminal.write(body)

    def _command(self, path: Path) -> list[str]:
        disk = self._disk
        system = f"file={disk.image},format=raw,if=none,id=system,snapshot=on,cache=unsafe"
        product = f"file={self._product},format=raw,if=none,id=product,readonly=on"
        return [
            *(QEMU, "-name", "kvmlab", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", f"tcg,thread=multi,tb-size={TCG_BUFFER_MIB}"),
            *("-M", "q35,hpet=off", "-cpu", CPU),
            *("-smp", str(CPUS), "-m", str(MEMORY_MIB), "-no-reboot"),
            *("-kernel", str(disk.kernel), "-initrd", str(disk.initrd)),
            *("-append", _KERNEL_PARAMETERS, "-serial", f"file:{self.console}"),
            *("-drive", system, "-device", "virtio-blk-pci,drive=system,serial=system"),
            *("-drive", product, "-device", "virtio-blk-pci,drive=product,serial=product"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=owner,path={path},server=on,wait=off"),
            *("-device", f"virtserialport,chardev=owner,name={wire.PORT}"),
        ]

    def _connect(self, path: Path) -> socket.socket:
        end = time.monotonic() + 30
        while True:
            channel = socket.socket(socket.AF_UNIX)
            try:
                channel.connect(os.fspath(path))
                return channel
            except OSError as error:
                channel.close()
                self._check(end, f"QEMU's socket: {error}")
                time.sleep(0.05)

    def _check(self, end: float, what: str) -> None:
        ended = self._process is not None and self._process.poll() is not None
        if ended or time.monotonic() > end:
            raise LabError(f"the lab does not boot ({what}); its console:\n  {self._tail(25)}")

    def _tail(self, count: int) -> str:
        """The console's last lines."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n  ".join(text.splitlines()[-count:])

    def _start(
        self, argv: list[str], environment: dict[str, str], directory: str, *, terminal: bool
    ) -> None:
        request = {"argv": argv, "env": environment, "cwd": directory, "tty": terminal}
        self._send(wire.RUN, json.dumps(request).encode())

    def _send(self, kind: int, data: bytes = b"") -> None:
        assert self._socket is not None
        self._socket.settimeout(60)
        self._socket.sendall(wire.frame(kind, data))

    def _receive(self, end: float) -> list[tuple[int, bytes]]:
        """Frames that came until `end` (monotonic), but not later than the first ones."""
        assert self._socket is not None
        now = time.monotonic()
        if now > self._end:
            raise LabError("the lab's time is over")
        self._socket.settimeout(max(end - now, 0.001))
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except ConnectionResetError:  # it had something of ours unread
            data = b""
        if not data:
            raise LabError(
                f"the lab machine has ended; its console's last lines:\n  {self._tail(2)}"
            )
        return list(self._reader.receive(data))
