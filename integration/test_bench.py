# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks make of their measurements; and one quick run of the work they measure."""

from __future__ import annotations

import dataclasses
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from integration.bench import density, loss, sides
from integration.lib import programs
from shimv2.config.hypervisor import HypervisorConfig


def rows() -> list[loss.Row]:
    integer, disk = loss.WORKS[0], next(w for w in loss.WORKS if w.group == "disk")
    return [
        loss.Row(integer, {"runc": [100, 200, 300], "virtio-fs": [10, 50, 40]}),
        loss.Row(disk, {"runc": [1000], "virtio-fs": [1500], "virtio-blk": [250]}),
    ]


def test_the_loss_is_that_of_the_medians() -> None:
    integer, disk = rows()
    assert integer.loss("virtio-fs") == pytest.approx(80)
    assert disk.loss("virtio-fs") == pytest.approx(-50)  # faster than native


def test_the_loss_tables_name_the_accelerator_and_what_it_means() -> None:
    text = loss.report(rows(), "tcg", 0.25)
    assert text.startswith("### Loss against runc: TCG, ")
    assert "| CPU, integer [Mops/s] | 200 | 40 | 80 % |" in text
    assert "| disk | sequential write, fsync [MB/s] |" in text
    assert "| runc | 1,000 |\n| virtio-fs | 1,500 (-50 %) |\n| virtio-blk | 250 (75 %) |" in text
    assert "say nothing about KVM" in text
    assert "say nothing" not in loss.report(rows(), "kvm", 0.25)


def test_each_way_to_have_a_disk_has_a_name_of_its_own_and_keys_that_there_are() -> None:
    setups = [sides.RUNC, sides.OURS, *sides.further(Path("/virtiofsd"))]
    assert len({setup.name for setup in setups}) == len(setups)
    known = {field.name for field in dataclasses.fields(HypervisorConfig)}
    assert {key for setup in setups for key in setup.hypervisor} <= known


def costs() -> list[density.Cost]:
    return [density.Cost(n, 25.0 * n, 100.0 * n, 3.0 * n, 12.0 * n, 150.0 * n) for n in (1, 2, 3)]


def test_the_density_table_tells_what_one_more_costs() -> None:
    someone_ended = density.Cost(4, 100.0, 400.0, 12.0, 48.0, -900.0)
    text = density.report(
        *("template", [*costs(), someone_ended], [0.1, 0.2, 0.3], {1: 0.5, 8: 2.0}, "tcg", 0.25)
    )
    assert text.startswith("### Idle sandboxes, template: TCG, ")
    assert "| 4 | 100 | 400 | 12 | 48 | 560 | 140.0 | -900 |" in text
    assert "\n| 3 |" not in text, "some of the rows"
    assert "| one more (median) | 140.0 MB (MemAvailable: 150.0 MB) |" in text
    assert "| shim, at 4 | 25.0 MB each |" in text
    assert "(median) | 0.200 s |" in text
    assert "8 at once | 2.00 s, 4.0 times one |" in text


def test_the_density_plot_is_an_svg_that_stays_inside_of_itself() -> None:
    root = ET.fromstring(density.plot("template", costs()))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    points = [
        tuple(map(float, point.split(",")))
        for shape in root.iter()
        for point in shape.attrib.get("points", "").split()
    ]
    assert points
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_a_start_of_another_kind_spoils_the_measurement(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("container a started: imported=0.1 kind=template\n")
    density.check_kind(log, "template")
    with pytest.raises(RuntimeError, match="no cache starts but"):
        density.check_kind(log, "cache")


def test_each_work_gives_a_rate(tmp_path: Path) -> None:
    program = programs.build("work", Path(loss.__file__).with_name("work.c").read_text())
    for work in loss.WORKS:
        if work.group != "network":
            kind, *more = work.command.split()
            place = [str(tmp_path / "file")] if work.group == "disk" else []
            command = [str(program), kind, "0.01", *place, *more]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            assert float(done.stdout) > 0, work.command
    done = subprocess.run([program, "nonsense"], capture_output=True, text=True, check=False)
    assert (done.returncode, "'nonsense'" in done.stderr) == (2, True)
