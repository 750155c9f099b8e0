# SPDX-License-Identifier: Apache-2.0
"""The launcher, run by this host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from guestbuild import launcher


def write(tmp_path: Path, *, path: str = "/bin/sh", words: list[str] | None = None) -> Path:
    file = tmp_path / "launcher"
    script = 'echo "$0|$#|$1|$A|$B"'
    file.write_bytes(launcher.program(path, words or ["sh", "-c", script, "me", "a b"], "A=1 ü"))
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("arguments", [(), ("x",), ("x", "y", "z")])
def test_words_and_a_variable_are_handed_on(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = write(tmp_path)
    environment = {"B": "2", "PATH": os.environ["PATH"]}
    result = subprocess.run([file, *arguments], env=environment, capture_output=True, check=True)
    assert result.stdout.decode() == "me|1|a b|1 ü|2\n"


def test_an_empty_environment_gets_the_variable(tmp_path: Path) -> None:
    file = write(tmp_path, path="/usr/bin/env", words=["env"])
    assert (
        subprocess.run([file], env={}, capture_output=True, check=True).stdout == "A=1 ü\n".encode()
    )


def test_a_missing_program_is_a_status(tmp_path: Path) -> None:
    file = write(tmp_path, path="/nowhere")
    assert subprocess.run([file], check=False).returncode == 127


def test_its_stack_is_not_executable(tmp_path: Path) -> None:
    headers = subprocess.run(
        ["readelf", "--segments", "--wide", write(tmp_path)],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    (stack,) = [line.split() for line in headers.splitlines() if "GNU_STACK" in line]
    assert stack[6] == "RW"
