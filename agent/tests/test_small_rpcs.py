# SPDX-License-Identifier: Apache-2.0
"""Metrics, volume figures, iptables, diagnostics and the way to wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import diagnostics, iptables, metrics, volumes, waiting
from agent.api import csi_pb2
from ttrpc.errors import Code, RpcError


def test_metrics_are_well_formed_and_named_as_katas() -> None:
    text = metrics.guest_metrics()
    families: dict[str, str] = {}
    seen: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in families, "a family is one block"
            families[name] = kind
        elif not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            float(value)
            name = sample.partition("{")[0]
            assert name == list(families)[-1]
            assert sample not in seen
            seen.add(sample)
    for name in (
        "kata_agent_threads", "kata_agent_total_time", "kata_agent_total_vm",
        "kata_agent_total_rss", "kata_agent_proc_status", "kata_agent_proc_stat",
        "kata_guest_load", "kata_guest_tasks", "kata_guest_cpu_time",
        "kata_guest_vm_stat", "kata_guest_meminfo", "kata_guest_netdev_stat",
        "kata_guest_filesystem_bytes", "kata_guest_filesystem_inodes",
    ):  # fmt: skip
        assert families[name] == "gauge", name
    assert families["kata_agent_scrape_count"] == "counter"
    assert 'kata_guest_meminfo{item="mem_total"}' in text
    assert 'kata_guest_cpu_time{cpu="total",item="user"}' in text


def test_meminfo_names() -> None:
    for name, wanted in (
        ("MemAvailable", "mem_available"),
        ("Active(anon)", "active_anon"),
        ("SUnreclaim", "s_unreclaim"),
        ("AnonHugePages", "anon_huge_pages"),
        ("DirectMap4k", "direct_map_4k"),
        ("Percpu", "percpu"),
    ):
        assert metrics._snake(name) == wanted


def test_scrapes_are_counted() -> None:
    metrics.guest_metrics()
    first = metrics._scrapes
    assert f"kata_agent_scrape_count {first + 1}\n" in metrics.guest_metrics()


def test_metrics_of_a_bare_guest(tmp_path: Path) -> None:
    text = metrics.guest_metrics(str(tmp_path), str(tmp_path / "none"))
    assert "kata_agent_scrape_count" in text
    assert "kata_guest" not in text


def test_volume_stats(tmp_path: Path) -> None:
    answer = volumes.volume_stats(str(tmp_path))
    figures = os.statvfs(tmp_path)
    size, inodes = answer.usage
    assert (size.unit, inodes.unit) == (csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES)
    assert size.total == figures.f_blocks * figures.f_frsize
    assert 0 < size.used <= size.total
    assert inodes.total == figures.f_files
    for path, code in ((f"{tmp_path}/none", Code.NOT_FOUND), ("x", Code.INVALID_ARGUMENT)):
        with pytest.raises(RpcError) as caught:
            volumes.volume_stats(path)
        assert caught.value.code == code


def test_filesystem_types_that_cannot_be_made() -> None:
    with pytest.raises(RpcError) as caught:
        waiting.run(volumes.make_filesystem("/dev/none", "xfs"))
    assert caught.value.code == Code.INVALID_ARGUMENT


def _programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(iptables, "_DIRECTORIES", (str(tmp_path),))


def test_iptables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(tmp_path, monkeypatch, "iptables-save", "echo '*nat'; echo COMMIT")
    _programs(tmp_path, monkeypatch, "ip6tables-restore", 'echo "$@"; cat')
    assert waiting.run(iptables.get_iptables(False)) == b"*nat\nCOMMIT\n"
    assert waiting.run(iptables.set_iptables(True, b"*filter\n")) == b"--wait 5\n*filter\n"
    _programs(tmp_path, monkeypatch, "iptables-restore", "echo line 3 failed >&2; exit 2")
    with pytest.raises(RpcError, match="status 2: line 3 failed"):
        waiting.run(iptables.set_iptables(False, b"x"))
    with pytest.raises(RpcError) as caught:
        waiting.run(iptables.get_iptables(True))
    assert caught.value.code == Code.UNIMPLEMENTED


def test_termination_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert diagnostics.termination_log("termination_log", str(log)) == ""
    log.write_text("out of cheese\n" + "x" * 5000)
    text = diagnostics.termination_log("termination_log", str(log))
    assert len(text) == 4096
    assert text.startswith("out of cheese\n")
    log.unlink()
    os.mkfifo(log)
    assert diagnostics.termination_log("termination_log", str(log)) == ""
    log.unlink()
    log.symlink_to("/etc/passwd")
    with pytest.raises(RpcError):
        diagnostics.termination_log("termination_log", str(log))
    with pytest.raises(RpcError) as caught:
        diagnostics.termination_log("dmesg", str(log))
    assert caught.value.code == Code.INVALID_ARGUMENT


def test_waiting_runs_to_the_end() -> None:
    turns = iter([False, False, True])

    def work() -> waiting.Work[str]:
        yield waiting.breathe()
        yield waiting.Wait("three turns", lambda: next(turns), 5.0, 0.001)
        try:
            yield waiting.Wait("never", lambda: False, 0.01, 0.001)
        except RpcError as error:
            done = yield waiting.Command(["/bin/sh", "-c", "cat; exit 3"], b"input")
            assert done is not None
            return f"{error.message}; {done.status} {done.stdout.decode()}"
        return "not reached"

    assert waiting.run(work()) == "timed out waiting for never; 3 input"


def test_a_volume_that_cannot_grow(tmp_path: Path) -> None:
    with pytest.raises(RpcError, match="nothing is mounted") as caught:
        waiting.run(volumes.resize_volume(str(tmp_path), 1 << 20, 0.1))
    assert caught.value.code == Code.NOT_FOUND
    with pytest.raises(RpcError, match="proc can't grow") as caught:
        waiting.run(volumes.resize_volume("/proc", 1 << 20, 0.1))
    assert caught.value.code == Code.UNIMPLEMENTED
