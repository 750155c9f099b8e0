#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Runs busybox in a virtual machine, by a containerd of its own that is gone afterwards."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE))
sys.dont_write_bytecode = True

from integration.lib.containerd import RUNTIME, Containerd, CtrError  # noqa: E402
from integration.lib.images import BUSYBOX_REFERENCE, busybox_image  # noqa: E402

# Printed by the host for itself, and by a shell in the guest.
FACTS = {
    "kernel": "uname -r",
    "CPUs": "grep -c ^processor /proc/cpuinfo",
    "memory": "awk '/MemTotal/ {printf \"%d MiB\", $2 / 1024}' /proc/meminfo",
    "up since": "awk '{printf \"%.1f s\", $1}' /proc/uptime",
}


def facts(shell: list[str]) -> list[str]:
    """The values of FACTS, as a shell sees them."""
    script = "; echo; ".join(FACTS.values())
    done = subprocess.run([*shell, script], capture_output=True, text=True, check=True)
    return values_of(done.stdout)


def values_of(output: str) -> list[str]:
    """The non-empty lines of what the script printed."""
    return [line.strip() for line in output.splitlines() if line.strip()]


def container(*command: str, options: tuple[str, ...] = ()) -> list[str]:
    """Arguments of ``ctr`` that run a command in a VM of its own."""
    return ["run", "--rm", *options, "--runtime", RUNTIME, BUSYBOX_REFERENCE, "demo", *command]


def demo(containerd: Containerd) -> None:
    """Host and guest side by side."""
    host = facts(["sh", "-c"])
    began = time.monotonic()
    done = containerd.ctr(*container("sh", "-c", "; echo; ".join(FACTS.values())))
    took = time.monotonic() - began
    print(f"\n  {'':10} {'host':28} container")
    for name, here, there in zip(FACTS, host, values_of(done.stdout), strict=True):
        print(f"  {name:10} {here:28} {there}")
    print(f"\nVM booted, container run, everything removed in {took:.1f} s")


def shell(containerd: Containerd) -> None:
    """An interactive shell in a container; the status of its last command is its own affair."""
    print("a shell in a container in a VM; leave it by exit or ^D\n", flush=True)
    arguments = container("sh", options=("--tty", "--env", f"TERM={os.environ.get('TERM', '')}"))
    subprocess.run([*containerd.ctr_command(), *arguments], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "shell"))
    parser.add_argument("--prefix", type=Path, required=True, help="where the runtime is installed")
    options = parser.parse_args()
    options.prefix = options.prefix.absolute()
    if os.geteuid() != 0:
        print("error: this starts containerd and virtual machines: run it as root", file=sys.stderr)
        return 1
    if options.action == "shell" and not sys.stdin.isatty():
        print("error: make shell needs a terminal", file=sys.stderr)
        return 1
    environment = {
        "KATA_CONF_FILE": str(options.prefix / "share/defaults/kata-containers/configuration.toml")
    }
    print("starting a containerd of our own", flush=True)
    try:
        with Containerd(shim_path=[options.prefix / "bin"], environment=environment) as containerd:
            containerd.import_image(busybox_image())
            demo(containerd) if options.action == "run" else shell(containerd)
    except (CtrError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("containerd stopped, nothing left behind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
