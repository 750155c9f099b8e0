# SPDX-License-Identifier: Apache-2.0
"""Guests of other parts than those that every other test runs: an initrd, Debian's kernel."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from integration.lib.kata import Kata
from integration.lib.templates import Templates, started

BUILDER = Path(__file__).resolve().parent.parent / "rootfs-builder"

pytestmark = pytest.mark.one_edition


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same base root as the image; not compressed, as that takes a minute."""
    folder = tmp_path_factory.mktemp("initrd")
    text = (BUILDER / "guest.yaml").read_text()
    text = re.sub(r"source: files/", f"source: {BUILDER}/files/", text)
    text = re.sub(r"path: \.\.$", f"path: {BUILDER.parent}", text, flags=re.M)
    described = yaml.safe_load(text)
    described["image"]["initrd_compression"] = "none"
    described["kernel"]["fragments"] = described["kernel"]["patches"] = []
    (folder / "guest.yaml").write_text(yaml.safe_dump(described))
    options = ["--kernel", "none", "--format", "initrd", "--output", str(folder)]
    subprocess.run(
        [sys.executable, BUILDER / "build.py", "--config", folder / "guest.yaml", *options],
        check=True,
    )
    return folder / "kata-containers-initrd.img"


def test_a_guest_in_an_initrd_boots_and_is_cloned(
    kata: Kata, templates: Templates, initrd: Path
) -> None:
    templates.file.write_text(
        re.sub(r"(?m)^image = .*$", f'initrd = "{initrd}"', templates.file.read_text())
    )
    kinds = []
    for _ in range(2):
        container_id = kata.start("sleep", "1000", flags=templates.flags)
        assert kata.execute(container_id, "sh", "-c", "echo written >/f; cat /f").stdout == (
            "written\n"
        )
        kinds.append(started(kata, container_id))
        kata.remove(container_id)
        templates.wait_made()
    assert kinds == ["cold", "template"]


def test_debian_s_kernel_comes_up_with_its_modules(
    kata: Kata, templates: Templates, tmp_path: Path
) -> None:
    options = ["--kernel", "debian", "--output", str(tmp_path)]
    subprocess.run([sys.executable, BUILDER / "build.py", *options], check=True)
    templates.set("factory", enable_template=False)
    templates.set(
        "hypervisor.qemu",
        kernel=str(tmp_path / "vmlinux"),
        image=str(tmp_path / "kata-containers.img"),
        modules_initrd=str(tmp_path / "modules-initrd.img"),
    )
    done = kata.run("sh", "-c", "uname -r; cat /proc/modules", flags=templates.flags)
    release, *modules = done.stdout.splitlines()
    assert "cloud" in release
    assert {"erofs", "overlay"} <= {line.split()[0] for line in modules}
