# SPDX-License-Identifier: Apache-2.0
"""The Python end of the interop tests and of the benchmark, and how the Go one is built.

python -m integration.ttrpc.peer serve SOCKET
python -m integration.ttrpc.peer bench SOCKET SECONDS IN_FLIGHT BYTES
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import trio
from google.protobuf.wrappers_pb2 import BytesValue

from ttrpc.client import Client
from ttrpc.server import Server
from ttrpc.tests.echo import ECHO, Echo

_GO_SOURCE = Path(__file__).resolve().parent / "go"


def go_peer() -> list[str]:
    """The command of the Go end; built into the cache when its source has changed.

    Raises:
        RuntimeError: it can't be built; with the compiler's words.
    """
    from integration.lib.go_tools import go
    from integration.lib.images import cache_dir

    digest = hashlib.sha256()
    for path in sorted(_GO_SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    program = cache_dir() / "go" / f"ttrpcpeer-{digest.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        temporary = program.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [go(), "build", "-trimpath", "-o", str(temporary), "."],
            cwd=_GO_SOURCE,
            env={**os.environ, "GOTOOLCHAIN": "auto", "GOFLAGS": "-mod=readonly"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"go build failed:\n{done.stderr[-4000:]}")
        temporary.rename(program)
    return [str(program)]


def python_peer() -> list[str]:
    """The command of the Python end."""
    return [sys.executable, "-m", "integration.ttrpc.peer"]


async def serve(path: str) -> None:
    """Listen on a socket, say so on stdout and serve until stdin ends."""
    server = Server()
    server.register(ECHO, Echo())
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_listeners, [trio.SocketListener(listener)])
            print("ready", flush=True)
            async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
                async for _ in stdin:
                    pass
            await server.shutdown(1)


async def bench(path: str, seconds: float, in_flight: int, size: int) -> dict[str, float]:
    """Call Echo from a number of tasks. The first tenth of the time isn't counted."""
    request = BytesValue(value=bytes(size))
    times: list[float] = []
    begin = trio.current_time() + seconds / 10
    end = begin + seconds
    now = trio.current_time

    async def call_on() -> None:
        while (start := now()) < end:
            await echo(request)
            if start >= begin:
                times.append(now() - start)

    async with Client(await trio.open_unix_socket(path)) as client:
        echo = client.stub(ECHO).Echo
        async with trio.open_nursery() as nursery:
            for _ in range(in_flight):
                nursery.start_soon(call_on)
    times.sort()
    return {
        "calls_per_s": len(times) / seconds,
        "p50_us": times[len(times) // 2] * 1e6,
        "p99_us": times[len(times) * 99 // 100] * 1e6,
    }


def main(arguments: list[str]) -> int:
    command, path, *numbers = arguments
    if command == "serve":
        trio.run(serve, path)
    else:
        seconds, in_flight, size = numbers
        print(json.dumps(trio.run(bench, path, float(seconds), int(in_flight), int(size))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
