# SPDX-License-Identifier: Apache-2.0
"""The agent as PID 1 of namespaces on the host, with real crun and without a VM.

Runs under `unshare --mount --pid --uts --ipc --fork`.  Arguments: the folder of the packages,
a folder for the sockets.  The stream port is a TCP port of 127.0.0.1 in place of a vsock one.
Writes `ready PORT` to stdout when it listens.
"""

from __future__ import annotations

import _socket
import os
import sys

ROOT, SOCKETS = sys.argv[1:]
sys.path[:0] = [ROOT]

from agent import cmdline, log, main, mounts, syscalls  # noqa: E402

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
streams = _socket.socket(_socket.AF_INET, kind)
streams.bind(("127.0.0.1", 0))
streams.listen(64)
agent.streams.listen(streams)
print("ready", streams.getsockname()[1], flush=True)
agent.loop.run()
