# SPDX-License-Identifier: Apache-2.0
"""The agent as PID 1 of namespaces on the host, with real crun and without a VM.

Runs under `unshare --mount --pid --uts --ipc --fork`.  Arguments: the folder of the packages,
a folder for the sockets.  The stream port and the debug
console are TCP ports of 127.0.0.1 in place of vsock ones.
Writes `ready STREAM_PORT CONSOLE_PORT` to stdout when it listens.
"""

from __future__ import annotations

import _socket
import sys

ROOT, SOCKETS = sys.argv[1:]
sys.path[:0] = [ROOT]

from agent import cmdline, debug_console, log, main, mounts, syscalls  # noqa: E402

syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.mount("proc", "/proc", "proc")
syscalls.mount("tmpfs", "/run", "tmpfs", 0, "mode=0755")
mounts.unmount("/sys/fs/cgroup")
syscalls.mount("cgroup2", "/sys/fs/cgroup", "cgroup2")

log.set_level("debug")
config = cmdline.AgentConfig()
config.server_addr = f"unix://{SOCKETS}/agent.sock"
agent = main.Agent(config)
agent.open_ports()
kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
ports = []
for _ in range(2):
    listener = _socket.socket(_socket.AF_INET, kind)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    ports.append(listener)
agent.streams.listen(ports[0])
debug_console.listen(ports[1], agent.loop, agent.reaper)
print("ready", *(port.getsockname()[1] for port in ports), flush=True)
agent.loop.run()
