# SPDX-License-Identifier: Apache-2.0
"""Configurations with templates, and how to tell what a sandbox's VM came from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from integration.lib.configuration import Configuration, installed
from integration.lib.containerd import Containerd
from integration.lib.kata import Kata, wait_until

MADE_WITHIN = 120  # seconds; the maker goes last on a busy host


def without_templates(prefix: Path) -> Path:
    """The installed configuration, with sandboxes that boot."""
    text = installed(prefix).read_text()
    assert "\nenable_template = true\n" in text
    file = prefix / "configuration-without-templates.toml"
    file.write_text(text.replace("\nenable_template = true\n", "\nenable_template = false\n"))
    return file


class Templates(Configuration):
    """A configuration of the test's own with templates, and where they lie."""

    def __init__(self, prefix: Path, directory: Path) -> None:
        super().__init__(prefix, directory)
        self.path = directory / "templates"
        self.prefix = prefix
        self.set("factory", enable_template=True, template_path=str(self.path))
        self.set("agent.kata", debug_console_enabled=True)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`kata-runtime factory …`."""
        program = self.prefix / "bin/kata-runtime"
        return subprocess.run(
            [program, "--config", self.file, "factory", *words],
            capture_output=True,
            text=True,
            timeout=MADE_WITHIN,
            check=False,
        )

    def run(self, *words: str) -> None:
        """The same, where it has to succeed.

        Raises:
            RuntimeError: it did not; with what it said.
        """
        done = self.command(*words)
        if done.returncode:
            raise RuntimeError(f"kata-runtime factory {' '.join(words)}: {done.stderr}")

    def ready(self) -> list[Path]:
        """Directories of the templates that are complete."""
        return sorted(self.path.glob("[0-9a-f]*[0-9a-f]/template.json"))

    def wait_made(self) -> Path:
        """Until one is there and its maker is gone; returns its directory."""

        def made() -> bool:
            return bool(self.ready()) and not list(self.path.glob("*.lock"))

        wait_until(made, MADE_WITHIN, f"a template is made: {self.command('status').stdout}")
        return self.ready()[0].parent


def kind_of(containerd: Containerd, container_id: str) -> str:
    """How the VM of a container that was started came to be, by the shim's log."""
    log = containerd.log.read_text()
    found = re.findall(rf"container {container_id} started: .* kind=([a-z]+)", log)
    assert found, f"no start of {container_id} in the log"
    return str(found[-1])


def started(kata: Kata, container_id: str) -> str:
    """As `kind_of`, as soon as the log has it."""
    log = kata.containerd.log
    wait_until(lambda: f"container {container_id} started" in log.read_text(), 10, "it is logged")
    return kind_of(kata.containerd, container_id)


def console(prefix: Path, container_id: str, script: str) -> dict[str, str]:
    """``name=value`` lines that a script prints in the guest."""
    done = subprocess.run(
        [prefix / "bin/kata-runtime", "exec", container_id],
        input=script.encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    text = done.stdout.decode(errors="replace").replace("\r", "")
    return dict(re.findall(r"^(?:guest# |> )*([a-z]+)=(\S+)\s*$", text, re.M))
