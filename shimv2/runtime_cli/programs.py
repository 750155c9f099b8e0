# SPDX-License-Identifier: Apache-2.0
"""Other programs of the host, asked for their versions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_LIMIT = 10.0
_QEMU = re.compile(r"QEMU emulator version (\d+(?:\.\d+)*)")
_RUST_VIRTIOFSD = re.compile(r"virtiofsd v?(\d+(?:\.\d+)+)")
_C_VIRTIOFSD = re.compile(r"virtiofsd version (\d+(?:\.\d+)*)")
_ANY = re.compile(r"\bv?(\d+\.\d+(?:\.\d+)*)")


@dataclass(frozen=True, slots=True)
class Program:
    """A program that answered.

    Attributes:
        version: digits and dots, "" if it said nothing that looks like one.
        kind: for virtiofsd ``C`` or ``Rust``.
    """

    path: Path
    version: str
    kind: str = ""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version for comparison."""
        return tuple(int(part) for part in self.version.split(".") if part)


class ProgramError(Exception):
    """A program that is missing or does not run; the message is one phrase."""


def _output(path: Path) -> str:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ProgramError(f"{path} --version gave no answer in {_LIMIT:.0f} s") from None
    except OSError as error:
        raise ProgramError(f"{path}: {error.strerror}") from None
    text = (done.stdout + done.stderr).decode(errors="replace").strip()
    if done.returncode != 0:
        last = text.splitlines()[-1] if text else f"status {done.returncode}"
        raise ProgramError(f"{path} --version failed: {last[:200]}")
    return text


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""


def qemu(path: Path) -> Program:
    """QEMU's version.

    Raises:
        ProgramError: missing, does not run, or is not QEMU.
    """
    version = _found(_QEMU, _output(path))
    if not version:
        raise ProgramError(f"{path} does not say that it is QEMU")
    return Program(path, version)


def virtiofsd(path: Path) -> Program:
    """virtiofsd's version and which of the two programs of that name it is.

    Raises:
        ProgramError: missing, does not run, or is neither.
    """
    text = _output(path)
    if version := _found(_C_VIRTIOFSD, text):
        return Program(path, version, "C")
    if version := _found(_RUST_VIRTIOFSD, text):
        return Program(path, version, "Rust")
    raise ProgramError(f"{path} does not say that it is virtiofsd")


def any_program(path: Path) -> Program:
    """Whatever version a program prints first.

    Raises:
        ProgramError: missing or does not run.
    """
    return Program(path, _found(_ANY, _output(path)))
