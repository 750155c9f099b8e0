# SPDX-License-Identifier: Apache-2.0
"""``python -m integration.bench.ttrpc``: ttrpc calls between Python and Go, in all four pairings."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from integration.bench.figures import Figure
from integration.ttrpc.peer import go_peer, python_peer

TREE = Path(__file__).resolve().parent.parent.parent

CASES = ((1, 64), (16, 64), (1, 1 << 20))
"""Calls in flight, bytes each way."""

GOALS = {(1, 64): 4000, (16, 64): 8000}
"""Calls per second with both ends Python."""

_PEERS = {"python": python_peer, "go": go_peer}


def measure(seconds: float, runs: int, only: list[str] | None = None) -> list[Figure]:
    """Rates and latencies of each case. A Figure's runtime names the pairing, "client-server".

    Args:
        seconds: of each run.
        only: pairings; all by default.
    """
    figures: list[Figure] = []
    for client in _PEERS:
        for server in _PEERS:
            pairing = f"{client}-{server}"
            if not only or pairing in only:
                figures += _measure_pairing(pairing, client, server, seconds, runs)
    return figures


def _measure_pairing(
    pairing: str, client: str, server: str, seconds: float, runs: int
) -> list[Figure]:
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="pykata-") as directory:
        socket = str(Path(directory, "s"))
        command = [*_PEERS[server](), "serve", socket]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TREE
        ) as peer:
            assert peer.stdin is not None and peer.stdout is not None
            if peer.stdout.readline() != b"ready\n":
                raise RuntimeError(f"{' '.join(command)} does not serve")
            for in_flight, size in CASES:
                results = [
                    _run(_PEERS[client](), socket, seconds, in_flight, size) for _ in range(runs)
                ]
                figures += _figures(pairing, in_flight, size, results)
            peer.stdin.close()
    return figures


def _run(
    client: list[str], socket: str, seconds: float, in_flight: int, size: int
) -> dict[str, float]:
    command = [*client, "bench", socket, str(seconds), str(in_flight), str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=TREE)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _figures(
    pairing: str, in_flight: int, size: int, results: list[dict[str, float]]
) -> list[Figure]:
    name = f"ttrpc, {_bytes(size)}, {in_flight} in flight"
    goal = ""
    if pairing == "python-python" and (in_flight, size) in GOALS:
        goal = f"≥ {GOALS[in_flight, size]}"
    rate = Figure(name, pairing, "calls/s", goal, [one["calls_per_s"] for one in results])
    figures = [rate]
    for key in ("p50", "p99"):
        values = [one[f"{key}_us"] / 1000 for one in results]
        figures.append(Figure(f"{name}, {key}", pairing, "ms", "", values))
    if size >= 1 << 20:
        rates = [value * size / 1e6 for value in rate.values]
        figures.append(Figure(f"{name}, each way", pairing, "MB/s", "", rates))
    return figures


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} B"


def ttrpc_table(figures: list[Figure]) -> str:
    """A text table of medians, a row a figure, the pairings side by side."""
    pairings = list(dict.fromkeys(figure.runtime for figure in figures))
    by_key = {(figure.name, figure.runtime): figure for figure in figures}
    rows = [["median of runs; client-server:", *pairings, "goal (python-python)"]]
    for name in dict.fromkeys(figure.name for figure in figures):
        found = [by_key[name, pairing] for pairing in pairings]
        cells = [_number(statistics.median(figure.values)) for figure in found]
        goal = next((figure.goal for figure in found if figure.goal), "")
        rows.append([f"{name} [{found[0].unit}]", *cells, goal])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    """Measure and print; writes the figures as JSON too."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench.ttrpc", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="of each case (default: 3)")
    parser.add_argument("--only", action="append", help="a pairing, such as python-go")
    parser.add_argument("--output", type=Path, default=TREE / "build/bench/ttrpc.json")
    args = parser.parse_args()
    figures = measure(args.seconds, args.runs, args.only)
    print(ttrpc_table(figures))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([figure.to_json() for figure in figures], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
