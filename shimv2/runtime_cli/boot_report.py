# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime boot-report``: where the time of starts went."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shimv2.boot import history
from shimv2.boot.history import KEPT, BootRecord
from shimv2.boot.phases import phases, total


class BootReportError(Exception):
    """Says what is missing, and what to do about it."""


def add_boot_report(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "boot-report",
        help="where the time of a sandbox's start went",
        description=f"Shows the phases of starts on this host, of which the newest {KEPT} are "
        "kept; without SANDBOX and --last, those of the newest one. Several starts are drawn to "
        "one scale.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "sandbox", nargs="?", metavar="SANDBOX", help="its id, or the start of it; it may be gone"
    )
    which.add_argument(
        "--last", type=_count, metavar="N", help=f"the newest N starts (1 to {KEPT})"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--svg", type=Path, metavar="FILE", help="draw the timeline as an SVG")
    form.add_argument(
        "--prometheus",
        action="store_true",
        help="print histograms of the phases, of all starts that are kept unless told otherwise",
    )


def boot_report(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit status.

    Raises:
        BootReportError: there is no such start, or the file can't be written.
    """
    try:
        known = history.load(history.HISTORY)
    except OSError as error:
        raise BootReportError(f"{error.filename}: {error.strerror}; run it as root") from error
    every = KEPT if options.prometheus else 1
    chosen = _choose(known, options.sandbox, options.last or every)
    if options.json:
        print(json.dumps([_row(record) for record in chosen], indent=2))
    elif options.prometheus:
        from shimv2.boot.prometheus import expose

        print(expose(chosen), end="")
    elif options.svg is not None:
        from shimv2.boot.svg import draw

        try:
            options.svg.write_text(draw(chosen), encoding="utf-8")
        except OSError as error:
            message = f"--svg {options.svg}: {error.strerror}; name a file in a directory that is"
            raise BootReportError(f"{message} there and can be written to") from error
    else:
        from shimv2.boot.terminal import render

        unicode = "utf" in (sys.stdout.encoding or "").lower()
        print(render(chosen, shutil.get_terminal_size().columns, unicode=unicode))
    return 0


def _choose(known: list[BootRecord], sandbox: str | None, count: int) -> list[BootRecord]:
    if not known:
        raise BootReportError(
            f"no start is kept in {history.HISTORY} yet; start a container, for example: "
            "ctr run --rm --runtime io.containerd.kata.v2 IMAGE ID true"
        )
    if sandbox is None:
        return known[-count:]
    named = {record.id: record for record in known}  # of each id its newest start
    if sandbox in named:
        return [named[sandbox]]
    matching = [name for name in named if sandbox and name.startswith(sandbox)]
    if len(matching) > 1:
        raise BootReportError(
            f"{sandbox!r} is the start of {', '.join(matching[-5:])}; give more of the id"
        )
    if not matching:
        raise BootReportError(
            f"no start of a sandbox {sandbox!r} among the {len(known)} that are kept; "
            f"--last {len(known)} shows them"
        )
    return [named[matching[0]]]


def _row(record: BootRecord) -> dict[str, Any]:
    found = [asdict(phase) | {"seconds": round(phase.seconds, 6)} for phase in phases(record)]
    return asdict(record) | {"seconds": total(record), "phases": found}


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= KEPT:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {KEPT}")
    return int(text)
