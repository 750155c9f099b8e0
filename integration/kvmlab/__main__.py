# SPDX-License-Identifier: Apache-2.0
"""`python -m integration.kvmlab`: build the lab machine, run tests in it, look around in it."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import time
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TREE / "rootfs-builder"))

from guestbuild.errors import BuildError  # noqa: E402 (the path comes first)
from guestbuild.progress import Progress  # noqa: E402
from integration.kvmlab import disk, product  # noqa: E402
from integration.kvmlab.machine import Lab, LabError  # noqa: E402
from integration.lib.images import cache_dir  # noqa: E402

RESULTS = TREE / "build/kvmlab"
INSIDE = "/product/tree"
PREPARE = "integration/kvmlab/files/prepare.sh"
_SUITE = "integration/kvmlab/suite"
SMOKE = [f"{_SUITE}/smoke.py"]
EVERYTHING = [f"{_SUITE}/{name}.py" for name in ("smoke", "check", "channels", "cgroups")]
EVERYTHING += ["integration/test_run.py", "integration/test_faults.py", "-k", "not go and not slow"]
ENVIRONMENT = {
    "PYTHONPATH": f"/product/site:{INSIDE}",
    "PYTHONPYCACHEPREFIX": "/var/cache/pyc",
    "PYKATA_CACHE": "/var/cache/pykata",
    "PYKATA_PREFIX": "/usr/local",
    "PYKATA_LAB": "1",
    "PYKATA_SLOWNESS": "5",
    "HYPOTHESIS_STORAGE_DIRECTORY": "/var/cache/hypothesis",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvmlab", description=__doc__)
    parser.add_argument("action", choices=("build", "smoke", "run", "shell"))
    parser.add_argument("tests", nargs="*", help="for run: what pytest gets, from the tree's root")
    known = list(disk.releases())
    parser.add_argument("--release", choices=known, default=known[0], help="of Debian")
    parser.add_argument("--limit", type=float, default=3600, metavar="S", help="of the whole run")
    parser.add_argument("--command", help="for shell: a command line to run there instead")
    options, rest = parser.parse_known_args()
    options.tests += rest
    return options


def main() -> int:
    options = parse()
    if os.geteuid() != 0:
        print(
            "error: the lab's disk is unpacked with its owners: run this as root", file=sys.stderr
        )
        return 1
    progress = Progress()
    cache = cache_dir()
    results = RESULTS / f"{options.release}-{os.getpid()}"
    try:
        release = disk.releases()[options.release]
        made = disk.build(release, cache, progress)
        if options.action == "build":
            print(made.image)
            return 0
        results.mkdir(parents=True, exist_ok=True)
        image = product.pack(release, cache, results / "product.erofs", progress)
        try:
            with Lab(made, image, results, limit=options.limit) as lab:
                return use(lab, options, results, progress)
        finally:
            image.unlink()
    except (BuildError, LabError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def use(lab: Lab, options: argparse.Namespace, results: Path, progress: Progress) -> int:
    """What the command line asks of a lab that has booted."""
    progress.note(f"lab: up, Linux {lab.kernel}")
    with progress.step("lab: make install"):
        mount = "mkdir -p /product && mount -o ro /dev/disk/by-id/virtio-product /product"
        status = lab.run(
            ["sh", "-ec", f"{mount}; exec sh {INSIDE}/{PREPARE}"], environment=ENVIRONMENT
        )
    if status:
        print(f"error: preparing the lab ended with {status}", file=sys.stderr)
        return 1
    if options.action == "shell":
        if options.command:
            return lab.run(
                ["sh", "-c", options.command],
                environment=ENVIRONMENT,
                directory=INSIDE,
                limit=options.limit,
            )
        if not sys.stdin.isatty():
            print("error: a shell needs a terminal", file=sys.stderr)
            return 1
        print("a shell in the lab; leave it by exit or ^D", flush=True)
        terminal = {"TERM": os.environ.get("TERM", "vt100")}
        return lab.shell(["bash", "-i"], ENVIRONMENT | terminal)
    tests = SMOKE if options.action == "smoke" else options.tests or EVERYTHING
    began = time.monotonic()
    pytest = ["python3", "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider"]
    pytest += ["--rootdir", INSIDE, "--durations=10", "--junitxml=/var/log/lab/junit.xml", *tests]
    status = lab.run(pytest, environment=ENVIRONMENT, directory=INSIDE, limit=options.limit)
    fetch(lab, results)
    took = time.monotonic() - began
    print(f"lab: tests ended with {status} after {took:.0f} s; logs in {results}", flush=True)
    return status


def fetch(lab: Lab, results: Path) -> None:
    """Bring logs and results back."""
    packed = io.BytesIO()
    collect = "journalctl --no-pager > /var/log/lab/journal; dmesg > /var/log/lab/dmesg"
    lab.run(
        ["sh", "-c", f"{collect}; tar -C /var/log/lab -cf - ."],
        output=packed,
        errors=sys.stderr.buffer,
    )
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                (results / Path(member.name).name).write_bytes(file.read())


if __name__ == "__main__":
    sys.exit(main())
