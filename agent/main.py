# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the guest: what happens in which order until the agent answers, and from then on."""

from __future__ import annotations

import os

from agent import cmdline, init, log
from agent.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.cmdline import AgentConfig

_BACKLOG = 256
_SERIAL_PORTS = "/dev/virtio-ports"


def main() -> None:
    """Never returns; as PID 1 an error that can't be survived ends the VM."""
    try:
        config = start_guest()
        serve(config)
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
    config = cmdline.load()
    warnings = init.early(config)
    log.set_level(config.log)
    for warning in (*config.warnings, *warnings):
        log.warning(warning)
    return config


def serve(config: AgentConfig) -> None:
    """Listen where the command line says, and serve for ever."""
    from agent.reaper import Reaper
    from agent.spawn import Commands

    loop = Loop(log.exception)
    reaper = Reaper(loop)
    Commands(loop, reaper)

    from agent.sandbox import Sandbox
    from agent.server import Server
    from agent.stdio import Streams

    streams = Streams(loop)
    sandbox = Sandbox(loop, reaper, streams, config)

    from agent.api import agent_pb2, health_pb2
    from agent.service import AgentService, Health, Services

    service = AgentService(sandbox, loop)
    server = Server(loop, Services((agent_pb2, service), (health_pb2, Health())))
    _open_ports(config, loop, reaper, server, streams)
    log.info("listening", address=config.server_addr)
    loop.after(0, lambda: _afterwards(sandbox))
    loop.run()


def _open_ports(config: AgentConfig, loop: Loop, reaper: Any, server: Any, streams: Any) -> None:
    scheme, _, rest = config.server_addr.partition("://")
    if scheme == "serial":
        _serve_serial(rest, server)
        return
    if scheme == "unix":
        server.listen(_unix_listener(rest))
        return
    server.listen(_vsock_listener(int(rest.rpartition(":")[2])))
    if config.passfd_listener_port:
        listener = _vsock_listener(config.passfd_listener_port)
        streams.listen(listener, listener._accept)
    if config.debug_console and config.debug_console_vport:
        from agent import debug_console

        debug_console.listen(_vsock_listener(config.debug_console_vport), loop, reaper)


def _serve_serial(name: str, server: Any) -> None:
    fd = os.open(_serial_port(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    server.serve(fd, on_close=lambda: _serve_serial(name, server))


def _serial_port(name: str) -> str:
    """The device of a virtio-serial port; without udev nobody makes /dev/virtio-ports."""
    path = f"{_SERIAL_PORTS}/{name}"
    if os.path.exists(path):
        return path
    ports = "/sys/class/virtio-ports"
    for port in os.listdir(ports):
        with open(f"{ports}/{port}/name", encoding="utf-8") as file:
            if file.read().strip() == name:
                return f"/dev/{port}"
    raise FileNotFoundError(f"no virtio-serial port is called {name!r}")


def _vsock_listener(port: int) -> Any:
    import _socket

    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    listener = _socket.socket(_socket.AF_VSOCK, kind)
    listener.bind((_socket.VMADDR_CID_ANY, port))
    listener.listen(_BACKLOG)
    return listener


def _unix_listener(path: str) -> Any:
    import _socket

    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    listener = _socket.socket(_socket.AF_UNIX, kind)
    listener.bind(path)
    listener.listen(_BACKLOG)
    return listener


def _afterwards(sandbox: Any) -> None:
    """What nobody has to wait for."""
    if os.getpid() == 1:
        for warning in init.late():
            log.warning(warning)
    from agent.loop import READ
    from agent.uevents import Uevents

    events = Uevents()

    def changed(_events: int) -> None:
        events.drain()
        sandbox.loop.recheck()

    sandbox.loop.watch(events.fileno(), READ, changed)
    _poll_watched(sandbox)
    _follow_host_clock(sandbox)


def _poll_watched(sandbox: Any) -> None:
    sandbox.storages.poll()
    sandbox.loop.after(2.0, lambda: _poll_watched(sandbox))


def _follow_host_clock(sandbox: Any) -> None:
    from agent import clock

    host = clock.host_clock()
    if host is None:
        return  # then the shim sets it each minute

    def sync() -> None:
        host.sync()
        sandbox.loop.after(clock.PTP_INTERVAL, sync)

    sync()
