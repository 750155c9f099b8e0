# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime direct-volume``: what CSI drivers tell the runtime of their volumes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any
from urllib.parse import quote

from shimv2 import direct_volumes
from shimv2.direct_volumes import DirectVolumeError
from shimv2.state import sandbox_dir


def add_direct_volume(commands: Any) -> None:
    """The command and its options, as Kata's."""
    parser = commands.add_parser(
        "direct-volume",
        help="disks that the guest mounts, in place of a volume's path",
        description="A CSI driver that leaves a disk to the guest notes here what the path of its "
        "volume stands for, before a pod starts.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="note what a path stands for")
    remove = actions.add_parser("remove", help="forget it")
    stats = actions.add_parser("stats", help="how full it is, as JSON; of a running sandbox")
    resize = actions.add_parser("resize", help="its disk has grown: let its file system")
    for action in (add, remove, stats, resize):
        action.add_argument("--volume-path", required=True, metavar="PATH", help="of the volume")
    add.add_argument(
        "--mount-info",
        required=True,
        metavar="JSON",
        help='as {"volume-type":"block","device":"/dev/sdf","fstype":"ext4","options":["rw"]}',
    )
    resize.add_argument("--size", required=True, type=_size, metavar="BYTES", help="to be reached")


def _size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        DirectVolumeError, ManagementError: why it could not be done.
    """
    volume: str = options.volume_path
    try:
        if options.action == "add":
            direct_volumes.add(volume, options.mount_info)
            return
        if options.action == "remove":
            direct_volumes.remove(volume)
            return
        sandboxes = [name for name in direct_volumes.users(volume) if sandbox_dir(name).exists()]
    except OSError as error:
        raise DirectVolumeError(f"{error.filename}: {error.strerror}") from error
    if not sandboxes:
        raise DirectVolumeError(f"no sandbox uses {volume}")
    from .management import ask

    if options.action == "stats":
        answer = ask(sandboxes[0], "GET", f"/direct-volume/stats?path={quote(volume, safe='')}")
        sys.stdout.write(answer.decode(errors="replace") + "\n")
    else:
        body = json.dumps({"VolumePath": volume, "Size": options.size}).encode()
        ask(sandboxes[0], "POST", "/direct-volume/resize", body)
