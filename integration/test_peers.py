# SPDX-License-Identifier: Apache-2.0
"""Crossed with Kata's own parts, where KATA_PEER_DIR says that they lie: our shim with Kata's
guest, and Kata's shim with ours.

The directory holds ``containerd-shim-kata-v2`` (Kata's Go or Rust shim), ``vmlinux.container`` and
``kata-containers.img`` (Kata's guest image with its own agent).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from integration.lib.configuration import installed
from integration.lib.containerd import Containerd, Edition
from integration.lib.images import busybox_image
from integration.lib.kata import Kata

PEER_DIR = os.environ.get("KATA_PEER_DIR", "")

pytestmark = pytest.mark.skipif(not PEER_DIR, reason="KATA_PEER_DIR does not say where Kata's are")


def configuration(prefix: Path, tmp_path: Path, **changes: str) -> Path:
    """The installed configuration with some values replaced."""
    text = installed(prefix).read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^#? *{key} = .*$", f"{key} = {value}", text, count=1)
        assert count, key
    path = tmp_path / "configuration.toml"
    path.write_text(text)
    return path


def test_our_shim_drives_kata_s_agent(kata: Kata, prefix: Path, tmp_path: Path) -> None:
    config = configuration(
        prefix,
        tmp_path,
        kernel=f'"{PEER_DIR}/vmlinux.container"',
        image=f'"{PEER_DIR}/kata-containers.img"',
        rootfs_type='"ext4"',
    )
    flags = ("--runtime-config-path", config)
    done = kata.run("sh", "-c", "echo out; exit 3", flags=flags, check=False)
    assert (done.returncode, done.stdout) == (3, "out\n")
    container_id = kata.start("sleep", "1000", flags=flags)
    assert kata.execute(container_id, "echo", "hi").stdout == "hi\n"


def test_kata_s_shim_drives_our_agent(edition: Edition, prefix: Path, tmp_path: Path) -> None:
    config = configuration(prefix, tmp_path)
    with Containerd(edition, shim_path=[Path(PEER_DIR)]) as containerd:
        containerd.import_image(busybox_image())
        kata = Kata(containerd)
        done = kata.run(
            *("sh", "-c", "echo out; exit 3"),
            flags=("--runtime-config-path", config),
            check=False,
        )
        assert (done.returncode, done.stdout) == (3, "out\n")
