# SPDX-License-Identifier: Apache-2.0
"""Container images made on the spot, so that nothing needs a registry.

`busybox_image` packs Debian's static busybox with a link for each of its applets into an
OCI image archive that ``ctr images import`` takes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

BUSYBOX = Path("/bin/busybox")
BUSYBOX_REFERENCE = "localhost/busybox:latest"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_EPOCH = 1_700_000_000  # fixed, so that the same inputs give the same digest

PASSWD = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\nuser:x:1000:1000::/home/user:/bin/sh\n"
GROUP = "root:x:0:\ndaemon:x:1:\nusers:x:100:user\nuser:x:1000:\n"


def cache_dir() -> Path:
    """Where built things are kept between runs, outside the tree."""
    named = os.environ.get("PYKATA_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base, "pykata")


def busybox_layer(extra: Mapping[str, bytes] | None = None) -> bytes:
    """An uncompressed layer: busybox, its applets, users, and the usual directories."""
    if not BUSYBOX.exists():
        raise SystemExit(f"{BUSYBOX} is missing: apt-get install busybox-static")
    applets = subprocess.run(
        [BUSYBOX, "--list"], check=True, capture_output=True, text=True
    ).stdout.split()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("bin", "dev", "etc", "home", "proc", "root", "run", "sys", "usr", "var"):
            _add(tar, name, kind=tarfile.DIRTYPE, mode=0o755)
        _add(tar, "tmp", kind=tarfile.DIRTYPE, mode=0o1777)
        _add(tar, "home/user", kind=tarfile.DIRTYPE, mode=0o755, owner=1000)
        _add(tar, "bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
        for applet in sorted(set(applets) - {"busybox"}):
            _add(tar, f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        _add(tar, "etc/passwd", PASSWD.encode())
        _add(tar, "etc/group", GROUP.encode())
        for name, data in sorted((extra or {}).items()):
            _add(tar, name, data, mode=0o755)
    return out.getvalue()


def layer_of(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed layer of a few files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(files.items()):
            _add(tar, name, data, mode=0o755)
    return out.getvalue()


class Image:
    """An OCI image in memory.

    Attributes:
        blobs: digest in hexadecimal → bytes.
        manifest: the manifest's digest, in `blobs` as well.
    """

    def __init__(
        self,
        layers: Iterable[bytes],
        *,
        command: Iterable[str] = ("/bin/sh",),
        environment: Iterable[str] = (
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        user: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.blobs: dict[str, bytes] = {}
        descriptors, diff_ids = [], []
        for layer in layers:
            packed = gzip.compress(layer, compresslevel=1, mtime=0)
            diff_ids.append("sha256:" + hashlib.sha256(layer).hexdigest())
            descriptors.append(self._add("application/vnd.oci.image.layer.v1.tar+gzip", packed))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Cmd": list(command),
                "Env": list(environment),
                **({"User": user} if user else {}),
                **({"Labels": dict(labels)} if labels else {}),
            },
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self._add("application/vnd.oci.image.config.v1+json", _json(config)),
            "layers": descriptors,
        }
        self.manifest = str(self._add(MANIFEST_TYPE, _json(manifest))["digest"])[7:]

    def _add(self, media_type: str, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def oci_archive(path: Path, reference: str, image: Image) -> Path:
    """Write an OCI image layout as a tar file; returns `path`."""
    manifest = image.blobs[image.manifest]
    index = _json(
        {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": MANIFEST_TYPE,
                    "digest": f"sha256:{image.manifest}",
                    "size": len(manifest),
                    "annotations": {"io.containerd.image.name": reference},
                }
            ],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", index)
        for digest, data in image.blobs.items():
            _add(tar, f"blobs/sha256/{digest}", data)
    temporary.rename(path)
    return path


def busybox_image(directory: Path | None = None) -> Path:
    """The archive of BUSYBOX_REFERENCE, made once and kept."""
    stamp = hashlib.sha256(BUSYBOX.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    path = (directory or cache_dir() / "images") / f"busybox-{stamp}.tar"
    if not path.exists():
        oci_archive(path, BUSYBOX_REFERENCE, Image([busybox_layer()]))
    return path


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _add(
    tar: tarfile.TarFile,
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    link: str = "",
    owner: int = 0,
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = kind, mode, link
    info.size, info.mtime = len(data), _EPOCH
    info.uid = info.gid = owner
    tar.addfile(info, io.BytesIO(data) if data else None)


def main() -> int:
    """Write the busybox image and print where it is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", type=Path, help="where to write (default: the cache)")
    print(busybox_image(parser.parse_args().directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
