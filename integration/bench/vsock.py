# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.vsock``: round trips and throughput of our vsock device.

The other end is the model of a guest in a process of its own (what the device can do), or a
real guest under QEMU with ``--guest`` (what a container gets on this machine).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from integration.bench.figures import Figure
from vmm.vsock import VhostUserChannel
from vmm.vsock.tests import guest_model, real_guest

TREE = Path(__file__).resolve().parent.parent.parent
ECHO, SINK, SOURCE = 1000, 1001, 1002
GOALS = {"guest to host": "≥ 120", "round trip, median": "0.25–0.6"}


@contextmanager
def model(directory: Path, socket: Path) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", guest_model.__name__, socket], cwd=TREE)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def virtual_machine(directory: Path, socket: Path) -> Iterator[None]:
    if missing := real_guest.missing():
        raise SystemExit(missing)
    with real_guest.running_guest(socket, real_guest.make_initrd(directory)):
        yield


async def _round_trips(channel: VhostUserChannel, count: int) -> list[float]:
    """Milliseconds of each of `count` exchanges of 100 bytes, sorted."""
    times = []
    async with await channel.connect_when_ready(ECHO, 60) as connection:
        stream = connection.stream
        for _ in range(count):
            start = time.perf_counter()
            await stream.send_all(bytes(100))
            left = 100
            while left:
                left -= len(await stream.receive_some(left))
            times.append((time.perf_counter() - start) * 1000)
    return sorted(times)


async def _connects(channel: VhostUserChannel, count: int) -> float:
    """Milliseconds of a connect and a close."""
    start = time.perf_counter()
    for _ in range(count):
        await (await channel.connect(ECHO)).aclose()
    return (time.perf_counter() - start) / count * 1000


async def _from_guest(channel: VhostUserChannel, size: int) -> float:
    """MB/s."""
    async with await channel.connect(SOURCE) as connection:
        start = time.perf_counter()
        await connection.stream.send_all(b"%d\n" % size)
        left = size
        while data := await connection.stream.receive_some(256 << 10):
            left -= len(data)
        assert left == 0
        return size / 1e6 / (time.perf_counter() - start)


async def _to_guest(channel: VhostUserChannel, size: int) -> float:
    """MB/s, up to the guest's answer that it has read all."""
    data = memoryview(real_guest.pattern())
    async with await channel.connect(SINK) as connection:
        start = time.perf_counter()
        left = size
        while left:
            part = data[: min(left, len(data))]
            await connection.stream.send_all(part)
            left -= len(part)
        await connection.stream.send_eof()
        while await connection.stream.receive_some(100):
            pass
        return size / 1e6 / (time.perf_counter() - start)


async def measure(runs: int, mib: int, guest: bool) -> list[Figure]:
    """All figures of one boot (or one model)."""
    name = "guest" if guest else "model"
    units = {
        "round trip, median": "ms",
        "round trip, 99 %": "ms",
        "connect and close": "ms",
        "guest to host": "MB/s",
        "host to guest": "MB/s",
        "host CPU for 1 GiB from the guest": "s",
    }
    figures = {
        title: Figure(f"vsock, {title}", name, unit, GOALS.get(title, ""))
        for title, unit in units.items()
    }
    with tempfile.TemporaryDirectory(prefix="pykata-") as directory:
        path = Path(directory, "vsock.sock")
        async with VhostUserChannel(path) as channel:
            with (virtual_machine if guest else model)(Path(directory), path):
                for _ in range(runs):
                    trips = await _round_trips(channel, 1000)
                    figures["round trip, median"].values.append(trips[500])
                    figures["round trip, 99 %"].values.append(trips[990])
                    figures["connect and close"].values.append(await _connects(channel, 100))
                    before = resource.getrusage(resource.RUSAGE_SELF)
                    rate = await _from_guest(channel, mib << 20)
                    after = resource.getrusage(resource.RUSAGE_SELF)
                    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    figures["guest to host"].values.append(rate)
                    figures["host CPU for 1 GiB from the guest"].values.append(cpu * 1024 / mib)
                    figures["host to guest"].values.append(await _to_guest(channel, mib << 20))
    return list(figures.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m integration.bench.vsock", description="Measure the vsock device."
    )
    parser.add_argument("--guest", action="store_true", help="a real guest instead of the model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mib", type=int, default=256, help="of each transfer")
    parser.add_argument("--output", type=Path, help="write the figures as JSON, too")
    args = parser.parse_args()
    figures = trio.run(measure, args.runs, args.mib, args.guest)
    for figure in figures:
        goal = f"  (goal {figure.goal})" if figure.goal else ""
        values = f"best {figure.best:8.3f}  median {figure.median:8.3f} {figure.unit}"
        print(f"{figure.name:42} {values}{goal}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps([figure.to_json() for figure in figures], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
