# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import mounts, submounts


def test_the_last_holder_unmounts(tmp_path: Path, namespaces: Callable[..., Any]) -> None:
    share = tmp_path / "share"
    (share / "dir").mkdir(parents=True)
    (share / "file").touch()

    def child() -> list[object]:
        point = str(share / "dir")
        mounts.mount("none", point, "tmpfs")  # as the kernel does it for a share
        held = submounts.Submounts(str(share))
        sources = [point, str(share / "file"), str(share / "nosuch"), "/etc", "tmpfs"]
        first, second = held.hold(sources), held.hold(sources)
        seen: list[object] = [first == second == [point]]
        held.release(first)
        seen.append(mounts.is_mount_point(point))
        held.release(second)
        seen.append(mounts.is_mount_point(point))
        third = held.hold(sources)  # no mount of its own now
        held.release(third)
        return seen

    assert namespaces(child) == [True, True, False]


def test_what_is_not_held_is_not_released(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        submounts.Submounts(str(tmp_path)).release([f"{tmp_path}/other"])
