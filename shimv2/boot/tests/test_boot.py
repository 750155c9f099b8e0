# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from shimv2.boot import history
from shimv2.boot.history import BadRecordError, BootRecord
from shimv2.boot.phases import phases, total
from shimv2.boot.svg import draw, ticks
from shimv2.boot.terminal import render
from shimv2.runtime_cli import main

MARKS = {
    "imported": 0.15,
    "rootfs-shared": 0.19,
    "prepared": 0.18,
    "vmm-started": 0.25,
    "driver-up": 1.2,
    "agent-connected": 1.99,
    "agent-answers": 2.0,
    "network": 2.1,
    "sandbox-created": 2.05,
    "streams-open": 2.11,
    "container-created": 2.5,
    "container-started": 2.6,
}


def record(name: str = "web", started: int = 1_700_000_000_000_000_000, **changes: Any) -> Any:
    values: dict[str, Any] = {"namespace": "default", "kind": "cold", "marks": MARKS}
    return BootRecord(id=name, started=started, **(values | changes))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "boot"
    monkeypatch.setattr(history, "HISTORY", directory)
    return directory


def test_what_is_saved_is_loaded_in_order(kept: Path) -> None:
    for started in (3, 1, 2):
        history.save(record(started=started), kept)
    assert [r.started for r in history.load(kept)] == [1, 2, 3]
    assert history.load(kept)[0] == record(started=1)
    assert kept.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in kept.iterdir()} == {0o600}


def test_the_newest_hundred_are_kept(kept: Path) -> None:
    for started in range(105):
        history.save(record(started=started), kept)
    assert [r.started for r in history.load(kept)] == list(range(5, 105))
    assert len(list(kept.iterdir())) == history.KEPT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "../../etc/passwd"),
        ("id", ".hidden"),
        ("id", "a" * 129),
        ("id", ""),
        ("id", 7),
        ("namespace", "a/b"),
        ("kind", "warm"),
        ("accelerator", "xen"),
        ("started", -1),
        ("started", True),
        ("marks", {}),
        ("marks", {"imported": float("nan")}),
        ("marks", {"imported": "0.1"}),
    ],
)
def test_a_field_out_of_place_is_named(field: str, value: object) -> None:
    with pytest.raises(BadRecordError, match=field.rstrip("s")):
        BootRecord(**(vars_of(record()) | {field: value}))


def vars_of(of: BootRecord) -> dict[str, Any]:
    return {name: getattr(of, name) for name in BootRecord.__slots__}


def test_files_that_are_no_record_are_passed_over(kept: Path) -> None:
    history.save(record(), kept)
    for number, content in enumerate((b"", b"[]", b"\xff", b"{}", b"7", b'{"id": "x"}')):
        (kept / f"{number:020d}-x.json").write_bytes(content)
    (kept / "notes.txt").write_text("not ours")
    assert history.load(kept) == [record()]


def test_a_newer_shim_may_tell_more_and_an_older_one_less() -> None:
    fields = vars_of(record())
    del fields["accelerator"]
    assert BootRecord.parse(json.dumps(fields | {"weather": "fair"})) == record()


def test_a_failed_write_leaves_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        history.save(record(), kept)
    assert os.listdir(kept) == []


def test_phases_leave_no_gap_and_sum_up() -> None:
    found = phases(record())
    names = [phase.name for phase in found]
    assert names == (
        ["shim", "prepare", "vmm", "kernel", "agent", "sandbox", "network", "create", "start"]
    )
    assert found[0].begin == 0
    assert all(a.end == b.begin for a, b in itertools.pairwise(found))
    assert sum(phase.seconds for phase in found) == pytest.approx(2.6)
    assert total(record()) == 2.6


def test_without_the_driver_kernel_and_agent_are_one_phase() -> None:
    marks = {name: at for name, at in MARKS.items() if name != "driver-up"}
    boot = phases(record(marks=marks))[3]
    assert (boot.name, boot.title) == ("boot", "firmware, kernel, agent")
    assert (boot.begin, boot.end) == (0.25, 2.0)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_bars_fit_the_terminal(width: int, unicode: bool) -> None:
    text = render([record(), record(kind="template")], width, unicode=unicode)
    assert text.isascii() is not unicode
    lines = text.splitlines()
    if width >= 80:
        assert max(map(len, lines)) <= width
    longest = next(line for line in lines if line.startswith("firmware, kernel"))
    assert longest.count("█" if unicode else "#") == max(
        line.count("█" if unicode else "#") for line in lines
    )
    assert "0.950 s  37%" in longest


def test_a_long_id_hides_no_figure_and_still_finds_the_start() -> None:
    heading = render([record("0123456789" * 6 + "abcd", accelerator="tcg")], 70).splitlines()[0]
    assert heading.startswith("cold start by TCG, 2.600 s  ")
    assert len(heading) == 70
    assert heading.rpartition(" ")[2].startswith("0123456789")


def test_the_svg_is_whole_and_takes_nothing_from_outside() -> None:
    text = draw([record(), record(kind="cache", marks={"imported": 0.1})])
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert {element.tag.removeprefix(space) for element in root.iter()} == (
        {"svg", "title", "style", "text", "rect", "line"}
    )
    assert "prefers-color-scheme:dark" in text
    assert text.count("http") == 1  # the name space
    assert "url(" not in text
    width = float(root.attrib["width"])
    bars = [e for e in root.iter(f"{space}rect") if e.attrib["height"] == "14"]
    assert len(bars) == 10
    for bar in bars:
        assert float(bar.attrib["x"]) + float(bar.attrib["width"]) < width - 50


@pytest.mark.parametrize("longest", [0.004, 0.47, 1.0, 2.6, 30.0])
def test_ticks_are_few(longest: float) -> None:
    found = ticks(longest)
    assert 3 <= len(found) <= 8
    assert found[0] == 0
    assert found[-1] <= longest * 1.001


def test_report_of_the_newest_of_one_and_of_many(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("web", "db", "web")):
        history.save(record(name, number), kept)

    def shown(*words: str) -> list[tuple[str, int]]:
        assert main(["boot-report", "--json", *words]) == 0
        return [(row["id"], row["started"]) for row in json.loads(capsys.readouterr().out)]

    assert shown() == [("web", 2)]
    assert shown("d") == [("db", 1)]
    assert shown("web") == [("web", 2)]
    assert shown("--last", "2") == [("db", 1), ("web", 2)]
    assert shown("--last", "100") == [("web", 0), ("db", 1), ("web", 2)]


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        ((), (), "start a container"),
        (("web",), ("x",), "--last 1 shows them"),
        (("web-1", "web-2"), ("web",), "give more of the id"),
        (("web",), ("--svg", "/nowhere/x.svg"), "name a file in a directory"),
    ],
)
def test_errors_say_what_to_do(
    kept: Path,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, ...],
    words: tuple[str, ...],
    hint: str,
) -> None:
    for name in names:
        history.save(record(name), kept)
    assert main(["boot-report", *words]) == 1
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("--last", "0"), ("--last", "101"), ("--last", "x"), ("web", "--last", "2")]
)
def test_wrong_usage(kept: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["boot-report", *words])
    assert ended.value.code == 2


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a scraper reads: (name, labels) → value; fails for a line of any other form."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            continue
        match = re.fullmatch(r"([a-z_]+)\{((?:[a-z]+=\"[^\"]*\",?)+)\} ([0-9.]+)", line)
        assert match, line
        labels = frozenset(re.findall(r'([a-z]+)="([^"]*)"', match[2]))
        assert (match[1], labels) not in found, line
        found[match[1], labels] = float(match[3])
    return found


def test_histograms_parse_and_add_up(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {name: at * 2 for name, at in MARKS.items()}
    for started, changes in enumerate(({}, {"marks": slow}, {"kind": "template"})):
        history.save(record(started=started, **changes), kept)
    assert main(["boot-report", "--prometheus"]) == 0
    text = capsys.readouterr().out
    found = samples(text)
    families = re.findall(r"^# TYPE (\S+) histogram$", text, re.M)
    assert len(families) == 2

    def buckets(name: str, **labels: str) -> list[float]:
        return [
            value
            for (of, its), value in found.items()
            if of == f"{name}_bucket" and set(labels.items()) < its
        ]

    whole, part = families
    cold = frozenset({("kind", "cold")})
    assert found[f"{whole}_count", cold] == 2
    assert found[f"{whole}_sum", cold] == pytest.approx(7800)
    counts = buckets(whole, kind="cold")
    assert counts == sorted(counts)
    assert counts[-1] == 2
    assert found[f"{whole}_bucket", cold | {("le", "4096")}] == 1
    kernel = cold | {("phase", "kernel")}
    assert found[f"{part}_sum", kernel] == pytest.approx(2850)
    assert found[f"{part}_bucket", kernel | {("le", "512")}] == 0
    assert found[f"{part}_bucket", kernel | {("le", "1024")}] == 1
    assert found[f"{part}_count", frozenset({("kind", "template"), ("phase", "start")})] == 1
