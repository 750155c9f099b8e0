# SPDX-License-Identifier: Apache-2.0
"""cri-tools' critest against our runtime, without a network.

usage: python -m integration.critest [--edition debian|go] [--sandboxer podsandbox|shim]
                                     [--focus REGEX] [--runtime kata|runc]

Prints each test that failed or was skipped, and ends with 1 if one failed that `EXPECTED` does
not name.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

from integration.conftest import edition_named
from integration.critest.expected import EXPECTED
from integration.critest.images import all_images
from integration.lib import cni
from integration.lib.cri import CriNode
from integration.lib.go_tools import critest

_INSIDE = "PYKATA_CRITEST_INSIDE"
TREE = Path(__file__).resolve().parents[2]


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m integration.critest")
    parser.add_argument("--edition", default="go", choices=("debian", "go"))
    parser.add_argument("--sandboxer", default="podsandbox", choices=("podsandbox", "shim"))
    parser.add_argument("--runtime", default="kata", choices=("kata", "runc"))
    parser.add_argument("--focus", default="", help="only tests whose name matches")
    parser.add_argument("--log", type=Path, help="where to leave containerd's log")
    arguments = parser.parse_args()
    if not os.environ.get(_INSIDE):
        # Mounts are shared, as systemd has them: tests of their propagation count on it.
        command = ["unshare", "--mount", "--propagation", "shared", sys.executable]
        os.environ[_INSIDE] = "1"
        os.execvp(command[0], [*command, "-m", "integration.critest", *sys.argv[1:]])
    prefix = Path(os.environ.get("PYKATA_PREFIX", TREE / "build/prefix"))
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    node = CriNode(
        edition_named(arguments.edition),
        prefix,
        network=functools.partial(cni.bridge, plugins=[portmap]),
        sandboxer=arguments.sandboxer,
        images=all_images(),
        sandbox_image="localhost/pause:3.10",
    )
    with node, tempfile.TemporaryDirectory() as reports:
        begin = time.monotonic()
        _run(node, Path(reports), arguments.runtime, arguments.focus)
        results = _read(Path(reports))
        if arguments.log:
            arguments.log.write_bytes(node.containerd.log.read_bytes())
        left = node.clean()
    return _show(results, left, time.monotonic() - begin)


def _run(node: CriNode, reports: Path, runtime: str, focus: str) -> None:
    endpoint = f"unix://{node.containerd.address}"
    command = [
        *(*node.host.launcher, str(critest())),
        *(f"--runtime-endpoint={endpoint}", f"--image-endpoint={endpoint}"),
        *(f"--runtime-handler={runtime}", f"--ginkgo.junit-report={reports}/report.xml"),
        "--ginkgo.no-color",
        *([f"--ginkgo.focus={focus}"] if focus else []),
    ]
    # It looks for a configuration of its own in /etc.
    subprocess.run(command, cwd=reports, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def _read(reports: Path) -> dict[str, tuple[str, str]]:
    """Test → ("passed", "failed" or "skipped", why)."""
    found: dict[str, tuple[str, str]] = {}
    for path in reports.glob("*.xml"):
        for case in xml.parse(path).getroot().iter("testcase"):
            name = case.get("name", "")
            if not name.startswith("[It] "):
                continue
            status, why = case.get("status", ""), ""
            for child in case:
                if child.tag in ("failure", "error", "skipped"):
                    why = child.get("message", "") or (child.text or "")
            found[name.removeprefix("[It] [k8s.io] ")] = (status, why)
    return found


def _show(results: dict[str, tuple[str, str]], left: dict[str, list[str]], seconds: float) -> int:
    counts: dict[str, int] = {}
    unexpected = []
    for name, (status, why) in sorted(results.items()):
        counts[status] = counts.get(status, 0) + 1
        known = next((reason for part, reason in EXPECTED.items() if part in name), "")
        if status == "failed" and not known:
            unexpected.append(name)
        if status == "failed":
            print(f"failed: {name}\n        {known or why.splitlines()[0][:300] if why else known}")
        elif status == "passed" and known:
            print(f"passed, and was not expected to: {name}")
    if left:
        print(f"left behind: {json.dumps(left)}")
    print(f"{seconds:.0f} s")
    failed = counts.get("failed", 0)
    print(f"{counts.get('passed', 0)} passed, {failed} failed, {counts.get('skipped', 0)} skipped")
    return 1 if unexpected or left or not results else 0


if __name__ == "__main__":
    sys.exit(main())
