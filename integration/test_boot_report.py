# SPDX-License-Identifier: Apache-2.0
"""`kata-runtime boot-report` of starts that containerd asked for."""

from __future__ import annotations

import json
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from integration.lib.kata import Kata, wait_until
from integration.lib.templates import Templates


def report(prefix: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [prefix / "bin/kata-runtime", "boot-report", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def kept(prefix: Path, container: str) -> dict[str, Any]:
    """The row of a start; it is written just after containerd was answered."""
    wait_until(lambda: report(prefix, container).returncode == 0, 10, "the start is kept")
    [row] = json.loads(report(prefix, container, "--json").stdout)
    assert isinstance(row, dict)
    return row


def test_a_cold_start_and_a_clone_are_kept_and_shown(
    kata: Kata, prefix: Path, templates: Templates, tmp_path: Path
) -> None:
    ids = [kata.new_id(), kata.new_id()]
    kata.run("true", flags=templates.flags, container_id=ids[0])
    templates.wait_made()
    kata.run("true", flags=templates.flags, container_id=ids[1])
    cold, clone = (kept(prefix, name) for name in ids)  # both are gone by now
    assert [cold["kind"], clone["kind"]] == ["cold", "template"]
    for row in (cold, clone):
        names = [phase["name"] for phase in row["phases"]]
        assert names[:2] == ["shim", "prepare"]
        assert names[-2:] == ["create", "start"]
        assert {"vmm", "agent"} < set(names)
        phases = sum(phase["seconds"] for phase in row["phases"])
        assert abs(phases - row["seconds"]) < 0.001
    seconds = {phase["name"]: phase["seconds"] for phase in cold["phases"]}
    assert seconds["kernel"] > seconds["vmm"]
    assert clone["seconds"] < cold["seconds"]

    file = tmp_path / "start.svg"
    done = report(prefix, ids[0], "--svg", file)
    assert done.returncode == 0, done.stderr
    texts = [element.text or "" for element in ET.parse(file).iter()]
    title = f"Cold start ({cold['accelerator'].upper()}): "
    assert any(text.startswith(title) for text in texts)
    assert "firmware, kernel" in report(prefix, ids[0]).stdout
    assert ids[0] in report(prefix, "--last", "100").stdout
    assert 'phase_durations_histogram_milliseconds_count{kind="cold",phase="kernel"} 1' in (
        report(prefix, ids[0], "--prometheus").stdout
    )


def test_an_unknown_sandbox_is_no_start(kata: Kata, prefix: Path) -> None:
    name = kata.new_id()
    kata.run("true", container_id=name)
    kept(prefix, name)
    done = report(prefix, name + "-not-there")
    assert done.returncode == 1
    assert "that are kept" in done.stderr
