# SPDX-License-Identifier: Apache-2.0
"""Whole builds of the root, from nothing: they need root and a Debian mirror."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from guestbuild import bundle, dependencies, description
from guestbuild.builder import IMAGE, INITRD, RECORD, Builder, Options
from guestbuild.progress import Progress

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or bool(dependencies.missing("none")), reason="needs root and mmdebstrap"
    ),
]
GUEST = Path(__file__).resolve().parent.parent / "guest.yaml"


def build(tmp_path: Path, name: str, image_format: str = "image") -> Path:
    options = Options(
        kernel="none",
        format=image_format,
        output=tmp_path / name,
        cache=tmp_path / f"cache-{name}",
    )
    Builder(description.load(GUEST), options, Progress(quiet=True)).build()
    return tmp_path / name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_builds_from_nothing_give_the_same_bytes(tmp_path: Path) -> None:
    first = build(tmp_path, "one")
    second = build(tmp_path, "two")
    assert sha256(first / IMAGE) == sha256(second / IMAGE)
    assert (first / RECORD).read_bytes() == (second / RECORD).read_bytes()

    record = json.loads((first / RECORD).read_text())
    assert record["sha256"] == sha256(first / IMAGE)
    assert record["size"] == (first / IMAGE).stat().st_size <= 60_000_000
    assert record["packages"]["static:crun"]
    assert record["protobuf"] == record["packages"]["pypi:protobuf"]

    # A second call takes the result that is there, and leaves no scratch files.
    before = (tmp_path / "cache-one/guest").stat().st_mtime_ns
    (first / IMAGE).unlink()
    build(tmp_path, "one")
    assert sha256(first / IMAGE) == record["sha256"]
    assert (tmp_path / "cache-one/guest").stat().st_mtime_ns == before
    assert sorted(os.listdir(first)) == sorted([IMAGE, RECORD])

    # From the same base root, an initrd.
    build(tmp_path, "one", "initrd")
    assert (first / INITRD).stat().st_size < 60_000_000


def test_a_changed_agent_changes_the_digest(tmp_path: Path) -> None:
    for name in ("agent", "ttrpc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "agent/main.py").write_text("def main(): pass\n")
    (tmp_path / "guest.yaml").write_text("packages: [crun]\nagent: {path: .}\n")
    guest = description.load(tmp_path / "guest.yaml")
    first = bundle.key(guest)
    assert bundle.key(guest) == first
    (tmp_path / "agent/main.py").write_text("def main(): return\n")
    assert bundle.key(guest) != first
