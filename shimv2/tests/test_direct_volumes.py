# SPDX-License-Identifier: Apache-2.0
"""Records of direct-assigned volumes, in Kata's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shimv2 import direct_volumes
from shimv2.direct_volumes import DirectVolumeError

VOLUME = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/v/mount"
RECORD = {
    "volume-type": "block",
    "device": "/dev/sdf",
    "fstype": "ext4",
    "metadata": {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch"},
    "options": ["ro", "noatime"],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(direct_volumes, "DIRECTORY", tmp_path / "direct-volumes")
    return tmp_path / "direct-volumes"


def test_added_found_used_and_removed(place: Path) -> None:
    assert direct_volumes.find(VOLUME) is None
    direct_volumes.add(VOLUME, json.dumps(RECORD))
    # Where Kata's own runtime looks for it (base64.URLEncoding).
    name = "L3Zhci9saWIva3ViZWxldC9wb2RzLzEvdm9sdW1lcy9rdWJlcm5ldGVzLmlvfmNzaS92L21vdW50"
    assert (place / name / "mountInfo.json").stat().st_mode & 0o777 == 0o600
    volume = direct_volumes.find(VOLUME)
    assert volume is not None
    assert (str(volume.device), volume.fstype, volume.readonly) == ("/dev/sdf", "ext4", True)
    assert (volume.group, volume.policy) == (1000, "OnRootMismatch")
    assert list(direct_volumes.users(VOLUME)) == []
    direct_volumes.claim(VOLUME, "pod1")
    assert list(direct_volumes.users(VOLUME)) == ["pod1"]
    direct_volumes.disclaim(VOLUME, "pod1")
    direct_volumes.disclaim(VOLUME, "pod1")
    assert list(direct_volumes.users(VOLUME)) == []
    direct_volumes.claim(VOLUME, "pod2")
    direct_volumes.forget_sandbox("pod2")
    assert list(direct_volumes.users(VOLUME)) == []
    direct_volumes.remove(VOLUME)
    direct_volumes.remove(VOLUME)
    assert list(place.iterdir()) == []
    with pytest.raises(DirectVolumeError, match=VOLUME):
        list(direct_volumes.users(VOLUME))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"volume-type": "spdkvol"}, "volume-type"),
        ({"device": "sdf"}, "device"),
        ({"device": None}, "device"),
        ({"fstype": ""}, "fstype"),
        ({"options": "ro"}, "options"),
        ({"metadata": {"fsGroup": "staff"}}, "fsGroup"),
        ({"metadata": {"fsGroupChangePolicy": "Never"}}, "fsGroupChangePolicy"),
        ({"metadata": {"encryptionKey": "k"}}, "encryptionKey"),
    ],
)
def test_records_that_cannot_be_used(change: dict[str, object], named: str, place: Path) -> None:
    with pytest.raises(DirectVolumeError, match=named):
        direct_volumes.add(VOLUME, json.dumps(RECORD | change))
    assert not place.exists()


def test_a_damaged_record_names_its_volume(place: Path) -> None:
    direct_volumes.add(VOLUME, json.dumps(RECORD))
    next(place.glob("*/mountInfo.json")).write_text("{")
    with pytest.raises(DirectVolumeError, match=f"{VOLUME}.*JSON"):
        direct_volumes.find(VOLUME)


def test_long_paths_are_ordinary_ones() -> None:
    assert direct_volumes.find("/" + "x" * 300) is None
    with pytest.raises(DirectVolumeError, match="longer"):
        direct_volumes.add("/" + "x" * 300, json.dumps(RECORD))
