# SPDX-License-Identifier: Apache-2.0
"""`python -m integration.kvmlab`: build the lab machine, run tests in it, look around in it."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
#: Each has a machine of its own; run unless others are named.
USUAL = (
    *("smoke", "check", "channels", "cgroups", "cache", "pods", "hotplug"),
    *("networks", "devmapper", "apparmor", "clock", "faults"),
)
SUITES = {name: [f"{_SUITE}/{name}.py"] for name in USUAL} | {
    "run": ["integration/test_run.py", "-k", "not go and not slow"]
}
ATTEMPTS = 3
MARGIN = 600.0  # seconds beside the tests': boot, installation, logs
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
    parser.add_argument(
        "tests",
        nargs="*",
        help=f"for run: {', '.join(SUITES)}, or what pytest gets at the tree's root",
    )
    known = list(disk.releases())
    parser.add_argument("--release", choices=known, default=known[0], help="of Debian")
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="S", help="of each machine's tests"
    )
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
        lab = Session(made, image, results, options, progress)
        try:
            return lab.look_around() if options.action == "shell" else lab.test()
        finally:
            image.unlink()
    except (BuildError, LabError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class Session:
    """What the command line asks of labs of one disk."""

    def __init__(
        self,
        made: disk.Disk,
        image: Path,
        results: Path,
        options: argparse.Namespace,
        progress: Progress,
    ) -> None:
        self._disk = made
        self._image = image
        self._results = results
        self._options = options
        self._progress = progress

    def look_around(self) -> int:
        """A shell on this terminal, or one command line.  Raises LabError."""
        options = self._options
        if not options.command and not sys.stdin.isatty():
            print("error: a shell needs a terminal", file=sys.stderr)
            return 1
        with self._machine(self._results) as lab:
            if options.command:
                return lab.run(
                    ["sh", "-c", options.command],
                    environment=ENVIRONMENT,
                    directory=INSIDE,
                    limit=options.limit,
                )
            print("a shell in the lab; leave it by exit or ^D", flush=True)
            terminal = {"TERM": os.environ.get("TERM", "vt100")}
            return lab.shell(["bash", "-i"], ENVIRONMENT | terminal)

    def test(self) -> int:
        """Run tests, each suite in a machine of its own.  Raises LabError."""
        options = self._options
        wanted = ["smoke"] if options.action == "smoke" else options.tests or list(USUAL)
        groups = [(name, SUITES[name]) for name in wanted if name in SUITES]
        if len(groups) < len(wanted):
            groups = [("tests", [word for name in wanted for word in SUITES.get(name, [name])])]
        statuses = {name: self._test_group(name, words) for name, words in groups}
        failed = [name for name, status in statuses.items() if status]
        print(f"lab: {', '.join(statuses)}: {len(failed) or 'none'} failed", *failed, flush=True)
        return max(statuses.values(), key=abs)

    def _test_group(self, name: str, words: list[str]) -> int:
        """Once; again if the machine was lost, which is the emulator's fault, not the tests'."""
        for attempt in range(1, ATTEMPTS + 1):
            results = self._results / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                return self._test_once(results, words)
            except LabError as error:
                if attempt == ATTEMPTS:
                    raise
                print(f"lab: {name}: lost its machine ({error}); again in a new one", flush=True)
        raise AssertionError

    def _test_once(self, results: Path, words: list[str]) -> int:
        began = time.monotonic()
        pytest = ["python3", "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider"]
        pytest += ["--rootdir", INSIDE, "--durations=10", "--junitxml=/var/log/lab/junit.xml"]
        with self._machine(results) as lab:
            status = lab.run(
                [*pytest, *words],
                environment=ENVIRONMENT,
                directory=INSIDE,
                limit=self._options.limit,
            )
            fetch(lab, results)
        took = time.monotonic() - began
        print(
            f"lab: {results.name}: ended with {status} after {took:.0f} s; logs in {results}",
            flush=True,
        )
        return status

    @contextmanager
    def _machine(self, results: Path) -> Iterator[Lab]:
        """A lab with the product installed."""
        with Lab(self._disk, self._image, results, limit=self._options.limit + MARGIN) as lab:
            self._progress.note(f"lab: up, Linux {lab.kernel}")
            with self._progress.step("lab: make install"):
                mount = "mkdir -p /product && mount -o ro /dev/disk/by-id/virtio-product /product"
                status = lab.run(
                    ["sh", "-ec", f"{mount}; exec sh {INSIDE}/{PREPARE}"], environment=ENVIRONMENT
                )
            if status:
                raise BuildError(f"preparing the lab ended with {status}")
            yield lab


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
