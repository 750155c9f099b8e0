# SPDX-License-Identifier: Apache-2.0
"""Direct-assigned volumes: disks that a CSI driver leaves to the guest to mount.

The driver (or ``kata-runtime direct-volume add``) notes what a volume's path stands for, in
Kata's format and place::

    /run/kata-containers/shared/direct-volumes/BASE64URL(volume path)/mountInfo.json
    {"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4",
     "metadata": {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch"}, "options": ["rw"]}

An empty file beside it, named like the sandbox, tells who uses it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shimv2.share import ShareError
from shimv2.state import DIRECT_VOLUMES

DIRECTORY = Path(DIRECT_VOLUMES)

_FILE = "mountInfo.json"
_BLOCK = "block"
_LIMIT = 64 << 10  # bytes of a record
_NAME_LIMIT = 255  # bytes of a file name
_GROUP, _POLICY = "fsGroup", "fsGroupChangePolicy"
_POLICIES = ("Always", "OnRootMismatch")
_METADATA = (_GROUP, _POLICY)


class DirectVolumeError(ShareError):
    """A record can't be used, or is not there; the message names it."""


@dataclass(frozen=True, slots=True)
class DirectVolume:
    """What a volume's path stands for.

    Attributes:
        device: block device, or file, on the host.
        group: all of it is to belong to this group; None for as it is.
        policy: "Always", or "OnRootMismatch".
    """

    device: Path
    fstype: str
    options: list[str]
    group: int | None = None
    policy: str = _POLICIES[0]

    @property
    def readonly(self) -> bool:
        said = [option for option in self.options if option in ("ro", "rw")]
        return bool(said and said[-1] == "ro")


def parse(text: str | bytes) -> DirectVolume:
    """A record.

    Raises:
        DirectVolumeError: names the field and its value.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DirectVolumeError(f"mount information is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DirectVolumeError("mount information: must be an object")
    kind = _text(document, "volume-type")
    if kind != _BLOCK:
        raise DirectVolumeError(f"volume-type: {kind!r} is not supported, only {_BLOCK!r} is")
    device = _text(document, "device")
    if not device.startswith("/"):
        raise DirectVolumeError(f"device: must be an absolute path, is {device!r}")
    options = document.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DirectVolumeError(f"options: must be a list of strings, is {options!r}")
    metadata = document.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DirectVolumeError(f"metadata: must be an object, is {metadata!r}")
    for name in metadata:
        if name not in _METADATA:
            raise DirectVolumeError(f"metadata.{name}: not supported")
    group, policy = metadata.get(_GROUP), metadata.get(_POLICY, _POLICIES[0])
    if group is not None and not (str(group).isascii() and str(group).isdigit()):
        raise DirectVolumeError(f"metadata.{_GROUP}: must be a group id, is {group!r}")
    if policy not in _POLICIES:
        raise DirectVolumeError(
            f"metadata.{_POLICY}: must be {' or '.join(_POLICIES)}, is {policy!r}"
        )
    return DirectVolume(
        Path(device),
        _text(document, "fstype"),
        options,
        int(group) if group is not None else None,
        policy,
    )


def _text(document: dict[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise DirectVolumeError(f"{name}: must be a text, is {value!r}")
    return value


def add(volume: str, record: str) -> None:
    """Note what a volume's path stands for; replaces what was noted before.

    Raises:
        DirectVolumeError: the record can't be used.
        OSError: it can't be written.
    """
    parse(record)
    directory = _directory(volume)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = directory.parent / f".{os.getpid()}"  # no name of base64
    try:
        fresh.touch(mode=0o600)
        fresh.write_text(record)
        fresh.replace(directory / _FILE)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def remove(volume: str) -> None:
    """Forget it; nothing noted is no error."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(_directory(volume))


def find(volume: str) -> DirectVolume | None:
    """What is noted of a path; None for an ordinary one.

    Raises:
        DirectVolumeError: the record can't be used.
    """
    try:
        with open(_directory(volume) / _FILE, "rb") as file:
            text = file.read(_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError, DirectVolumeError):
        return None
    try:
        if len(text) > _LIMIT:
            raise DirectVolumeError(f"more than {_LIMIT} bytes")
        return parse(text)
    except DirectVolumeError as error:
        raise DirectVolumeError(f"direct volume {volume}: {error}") from None


def claim(volume: str, sandbox_id: str) -> None:
    """Note who uses it, for `kata-runtime`."""
    (_directory(volume) / sandbox_id).touch(mode=0o600)


def disclaim(volume: str, sandbox_id: str) -> None:
    """The opposite of `claim`; nothing noted is no error."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (_directory(volume) / sandbox_id).unlink()


def forget_sandbox(sandbox_id: str) -> None:
    """It is gone, and has not disclaimed what it used."""
    for directory in DIRECTORY.iterdir():
        with contextlib.suppress(OSError):
            (directory / sandbox_id).unlink()


def users(volume: str) -> Iterator[str]:
    """Ids of the sandboxes that use a volume.

    Raises:
        DirectVolumeError: nothing is noted of this path.
    """
    try:
        names = os.listdir(_directory(volume))
    except FileNotFoundError:
        raise DirectVolumeError(f"{volume} is not a direct volume") from None
    yield from (name for name in sorted(names) if name != _FILE)


def _directory(volume: str) -> Path:
    name = base64.urlsafe_b64encode(os.fsencode(volume)).decode()
    if len(name) > _NAME_LIMIT:
        raise DirectVolumeError(f"volume path {volume[:40]}…: longer than 189 bytes")
    return DIRECTORY / name
