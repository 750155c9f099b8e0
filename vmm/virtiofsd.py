# SPDX-License-Identifier: Apache-2.0
"""virtiofsd, which serves one directory to one VM as virtio-fs.

Two programs have that name: the C one that came with QEMU up to 7.2 (options ``-o a,b``)
and the Rust one (``--options``).  Both inherit a listening vhost-user socket, so the VMM can
connect at once and nobody has to wait for a file to appear.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import mmap
import os
import re
import resource
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vmm.errors import VmmConfigError, VmmError
from vmm.hypervisor import Placement
from vmm.process import HelperProcess

log = logging.getLogger(__name__)

CACHE_MODES = ("never", "metadata", "auto", "always")

_MAX_SOCKET_PATH = 107
_VERSION_TIMEOUT = 5.0


class Flavor(enum.Enum):
    """Which command line the program speaks."""

    C = "c"
    RUST = "rust"


# Texts of the two usage messages: looking for them in the file takes a millisecond, running
# the program five.
_MARKERS = ((b"readdirplus|no_readdirplus", Flavor.C), (b"announce-submounts", Flavor.RUST))

_flavors: dict[tuple[str, int, int], Flavor] = {}


def detect_flavor(binary: Path) -> Flavor:
    """Which virtiofsd this is; remembered by path, size and modification time.

    Raises:
        VmmConfigError: the file cannot be read, or is no virtiofsd.
    """
    try:
        status = binary.stat()
        key = (str(binary), status.st_mtime_ns, status.st_size)
        if key not in _flavors:
            _flavors[key] = _flavor_by_content(binary) or _flavor_by_version(binary)
        return _flavors[key]
    except OSError as error:
        raise VmmConfigError(f"virtiofsd {binary}: {error.strerror}") from error


def command_line(
    flavor: Flavor,
    binary: Path,
    shared_dir: Path,
    socket_fd: int,
    cache: str = "auto",
    extra_args: Sequence[str] = (),
) -> list[str]:
    """The argument vector.  `extra_args` come last, so they win.

    Raises:
        VmmConfigError: an unknown cache mode, or one this flavor lacks.
    """
    if cache not in CACHE_MODES:
        raise VmmConfigError(f"virtio-fs cache mode {cache!r} is none of {', '.join(CACHE_MODES)}")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    argv = [str(binary), f"--fd={socket_fd}", f"--rlimit-nofile={files}"]
    if flavor is Flavor.RUST:
        argv += [f"--shared-dir={shared_dir}", f"--cache={cache}", "--announce-submounts"]
        argv += ["--xattr", "--sandbox=namespace"]
        return [*argv, *extra_args]
    if cache == "metadata":
        raise VmmConfigError('virtio-fs cache mode "metadata" needs the Rust virtiofsd')
    options = [
        f"source={shared_dir}",
        f"cache={'none' if cache == 'never' else cache}",
        "announce_submounts",
        "xattr",
        "sandbox=namespace",
    ]
    return [*argv, "-o", ",".join(options), *extra_args]


class Virtiofsd:
    """One virtiofsd process; leaving the block kills it and removes its socket.

    Args:
        binary: either program.
        shared_dir: what the guest sees.
        socket: the vhost-user socket, made here.
        cache: never, metadata, auto or always.
        extra_args: from the configuration; passed as they are.
        placement: cgroup and network namespace.
    """

    def __init__(
        self,
        binary: Path,
        shared_dir: Path,
        socket: Path,
        cache: str = "auto",
        extra_args: Sequence[str] = (),
        placement: Placement | None = None,
    ) -> None:
        self.socket = socket
        self._binary = binary
        self._shared_dir = shared_dir
        self._cache = cache
        self._extra_args = tuple(extra_args)
        self._placement = placement
        self._process: HelperProcess | None = None
        self._bound = False
        self._nursery_manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._nursery is not None
        await self.stop()
        self._nursery.cancel_scope.cancel()
        if exc is not None and not isinstance(exc, trio.Cancelled):
            exc_type = exc = tb = None  # passes by the nursery, which would wrap it
        await self._nursery_manager.__aexit__(exc_type, exc, tb)

    async def start(self) -> None:
        """Bind the socket and launch.  The VMM may connect from now on.

        Raises:
            VmmConfigError: program, directory, socket path or cache mode cannot be used.
        """
        if self._nursery is None or self._process is not None:
            raise VmmError("virtiofsd is started once, inside its async with block")
        if not self._shared_dir.is_dir():
            raise VmmConfigError(f"shared directory {self._shared_dir} is not a directory")
        if "," in str(self._shared_dir):
            raise VmmConfigError(f"shared directory {self._shared_dir} has a comma in its name")
        flavor = detect_flavor(self._binary)
        with self._bind() as listener:
            fd = listener.fileno()
            process = HelperProcess(
                command_line(
                    flavor, self._binary, self._shared_dir, fd, self._cache, self._extra_args
                ),
                name="virtiofsd",
                placement=self._placement,
                pass_fds=(fd,),
                on_line=lambda line: log.info("virtiofsd: %s", line),
            )
            process.start(self._nursery)
            self._process = process

    async def wait(self) -> str:
        """Return when it has ended, with how and its last lines of output."""
        if self._process is None:
            raise VmmError("virtiofsd was not started")
        await self._process.wait()
        return self._process.describe_end()

    async def stop(self) -> None:
        """Kill, reap, remove the socket.  Idempotent."""
        if self._process is not None:
            await self._process.kill()
        if self._bound:
            with contextlib.suppress(OSError):
                self.socket.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        """Process id on the host (of the outer process; it has a child in its sandbox)."""
        if self._process is None or self._process.ended:
            raise VmmError("virtiofsd is not running")
        return self._process.pid

    def _bind(self) -> socket.socket:
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH:
            raise VmmConfigError(f"socket path {self.socket} is over {_MAX_SOCKET_PATH} bytes")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.socket))
            self._bound = True
            os.chmod(self.socket, 0o600)
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise VmmConfigError(f"socket {self.socket}: {error.strerror}") from error
        return listener


def _flavor_by_content(binary: Path) -> Flavor | None:
    with binary.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None  # a wrapper script says nothing about the program behind it
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            for marker, flavor in _MARKERS:
                if content.find(marker) >= 0:
                    return flavor
    return None


def _flavor_by_version(binary: Path) -> Flavor:
    try:
        result = subprocess.run(
            [binary, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VmmConfigError(f"virtiofsd {binary} does not answer --version") from error
    text = result.stdout.decode("utf-8", "replace")
    if text.startswith("virtiofsd version"):
        return Flavor.C
    if re.match(r"virtiofsd v?\d", text):
        return Flavor.RUST
    raise VmmConfigError(f"{binary} is no virtiofsd: --version printed {text[:80]!r}")
