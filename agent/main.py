# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the guest: what happens in which order until the agent answers, and from then on.

All that is needed for the first answers is imported here at the top: the image keeps these
modules together in one file that the guest reads at once.
"""

from __future__ import annotations

import gc
import os

from ttrpc import upb

gc.disable()  # until all is loaded: there is no garbage before
upb.install()

from agent import cmdline, init, log  # noqa: E402
from agent.api import agent_pb2, health_pb2  # noqa: E402
from agent.loop import READ, Loop  # noqa: E402
from agent.reaper import Reaper  # noqa: E402
from agent.sandbox import Sandbox  # noqa: E402
from agent.server import Server  # noqa: E402
from agent.service import AgentService, Health, Services  # noqa: E402
from agent.spawn import Commands  # noqa: E402
from agent.stdio import Streams  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.cmdline import AgentConfig

_BACKLOG = 256
_STREAM_BUFFER = 1 << 20  # bytes
_SO_VM_SOCKETS_BUFFER_SIZE = 0  # linux/vm_sockets.h
_SO_VM_SOCKETS_BUFFER_MAX_SIZE = 2
_WATCH_INTERVAL = 2.0  # seconds between looks at watched directories, as Kata's agent does


def main() -> None:
    """Never returns; as PID 1 an error that can't be survived ends the VM."""
    try:
        config = start_guest()
        agent = Agent(config)
        agent.open_ports()
        log.info("listening", address=config.server_addr)
        gc.freeze()
        gc.enable()
        agent.loop.after(0, agent.settle)
        agent.loop.run()
    except BaseException as error:
        log.exception(error)
        if os.getpid() == 1:
            from agent import syscalls

            syscalls.reboot(syscalls.REBOOT_POWER_OFF)
        raise


def start_guest() -> AgentConfig:
    """Mounts, console and configuration: what comes before the listener."""
    if os.getpid() != 1:  # on a developer's host
        return cmdline.load()
    init.mount_proc()
    init.leave_rootfs()
    config = cmdline.load()
    warnings = init.early(config)
    log.set_level(config.log)
    if config.log_vport:
        from agent.log_port import LogPort

        log.port = LogPort()
    for warning in (*config.warnings, *warnings):
        log.warning(warning)
    return config


class Agent:
    """The parts of the agent, put together; it listens once `open_ports` was called."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.loop = Loop(log.exception)
        self.reaper = Reaper(self.loop)
        Commands(self.loop, self.reaper)
        self.streams = Streams(self.loop)
        self.sandbox = Sandbox(self.loop, self.reaper, self.streams, config)
        services = Services((agent_pb2, AgentService(self.sandbox)), (health_pb2, Health()))
        self.server = Server(self.loop, services)

    def open_ports(self) -> None:
        """Listen where the command line says.

        Raises:
            OSError: there is no such port, socket or vsock device.
        """
        config = self.config
        scheme, _, rest = config.server_addr.partition("://")
        if scheme == "serial":
            from agent.serial import SerialPort

            SerialPort(self.loop, self.server, rest)
            return
        if scheme == "unix":
            self.server.listen(_unix_listener(rest))
            return
        if log.port is not None:
            log.port.listen(_vsock_listener(config.log_vport), self.loop)
        self.server.listen(_vsock_listener(int(rest.rpartition(":")[2])))
        if config.passfd_listener_port:
            listener = _vsock_listener(config.passfd_listener_port)
            _widen(listener)
            self.streams.listen(listener)
        if config.forward_port:
            self._forward_ports(_vsock_listener(config.forward_port))
        if config.debug_console and config.debug_console_vport:
            from agent import debug_console

            listener = _vsock_listener(config.debug_console_vport)
            debug_console.listen(listener, self.loop, self.reaper)

    def _forward_ports(self, listener: Any) -> None:
        def connected(_events: int) -> None:
            from agent import forward

            forward.accept(listener, self.loop)

        self.loop.watch(listener.fileno(), READ, connected)

    def settle(self) -> None:
        """What nobody has to wait for."""
        if os.getpid() == 1:
            for warning in init.late():
                log.warning(warning)
        self._follow_uevents()
        self._poll_watched()
        self._follow_host_clock()

    def _follow_uevents(self) -> None:
        from agent.uevents import Uevents

        events = Uevents()

        def changed(_events: int) -> None:
            events.drain()
            self.loop.recheck()

        self.loop.watch(events.fileno(), READ, changed)

    def _poll_watched(self) -> None:
        self.sandbox.storages.poll()
        self.loop.after(_WATCH_INTERVAL, self._poll_watched)

    def _follow_host_clock(self) -> None:
        from agent import clock

        host = clock.host_clock()
        if host is None:
            return  # then the shim sets it each minute

        def sync() -> None:
            host.sync()
            self.loop.after(clock.PTP_INTERVAL, sync)

        sync()


def _vsock_listener(port: int) -> Any:
    import _socket

    return _listener(_socket.AF_VSOCK, (_socket.VMADDR_CID_ANY, port))


def _widen(listener: Any) -> None:
    """Let each accepted stream have more in flight; Linux caps that at the sender's own buffer."""
    import _socket

    for option in (_SO_VM_SOCKETS_BUFFER_MAX_SIZE, _SO_VM_SOCKETS_BUFFER_SIZE):
        listener.setsockopt(_socket.AF_VSOCK, option, _STREAM_BUFFER)  # 64 bits, as vsock wants


def _unix_listener(path: str) -> Any:
    import _socket

    return _listener(_socket.AF_UNIX, path)


def _listener(family: int, address: Any) -> Any:
    import _socket

    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    listener = _socket.socket(family, kind)
    listener.bind(address)
    listener.listen(_BACKLOG)
    return listener
