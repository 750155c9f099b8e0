# SPDX-License-Identifier: Apache-2.0
"""The lab's second disk: this tree as it is now, what was built of it, and what its tests need.

/tree     the tree, with build/guest and the dependencies that `make install` would download
/site     pytest and the like, for the lab's Python
/cache    what the tests have built before (images, containerd of Go)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from guestbuild import digest
from guestbuild.command import run
from guestbuild.errors import BuildError
from guestbuild.lock import locked
from guestbuild.progress import Progress
from integration.kvmlab.disk import Release
from integration.lib.images import busybox_image

TREE = Path(__file__).resolve().parents[2]
GUEST = TREE / "build/guest"
_TEST_REQUIREMENTS = (
    "pytest>=8",
    "pytest-trio>=0.8",
    "hypothesis>=6",
    "psutil>=5.9",
    "protobuf>=6.31",
)
#: Parts of the cache that tests find again by themselves.
_CACHED = ("images", "programs", "go")


def pack(release: Release, cache: Path, target: Path, progress: Progress) -> Path:
    """Write the disk's image.

    Raises:
        BuildError: there is no guest yet; pip or mkfs.erofs failed.
    """
    if not (GUEST / "kata-containers.json").exists():
        raise BuildError(f"no guest in {GUEST}: build it with `make guest`")
    busybox_image()  # into the cache
    site = _site(release, cache, progress)
    with (
        progress.step("lab: this tree as a disk"),
        tempfile.TemporaryDirectory(dir=cache / "kvmlab", prefix="product-") as scratch,
    ):
        stage = Path(scratch)
        for name in _tracked():
            _link(TREE / name, stage / "tree" / name)
        _link_tree(GUEST, stage / "tree/build/guest")
        _link_tree(_dependencies(release, cache), stage / "tree/build/deps" / _tag(release))
        _link_tree(site, stage / "site")
        for name in _CACHED:
            if (cache / name).is_dir():
                _link_tree(cache / name, stage / "cache" / name)
        target.unlink(missing_ok=True)
        run(["mkfs.erofs", "--quiet", "-T0", target, stage])
    return target


def _tracked() -> list[str]:
    """Files of the tree that git knows, or would know if they were added."""
    command = ["git", "-C", str(TREE), "ls-files", "-z", "-co", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise BuildError(f"git ls-files: {done.stderr.decode(errors='replace').strip()}")
    names = done.stdout.decode().split("\0")
    return [name for name in names if name and (TREE / name).is_file()]


def _tag(release: Release) -> str:
    """What tools/install.py calls the directory of its dependencies."""
    tag = f"cpython-{release.python.replace('.', '')}\n".encode().strip()
    text = (TREE / "tools/requirements.txt").read_bytes()
    import hashlib

    return hashlib.sha256(text + tag).hexdigest()[:16]


def _dependencies(release: Release, cache: Path) -> Path:
    lines = (TREE / "tools/requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return _installed(release, wanted, cache)


def _site(release: Release, cache: Path, progress: Progress) -> Path:
    with locked(cache, "kvmlab-site", progress):
        return _installed(release, list(_TEST_REQUIREMENTS), cache)


def _installed(release: Release, wanted: list[str], cache: Path) -> Path:
    """Python packages for the lab's Python in a directory, downloaded once."""
    made = cache / "kvmlab" / f"python-{digest.of_value([wanted, release.python])}"
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        new = Path(scratch) / "new"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(new)]
        command += ["--only-binary", ":all:", "--python-version", release.python]
        command += ["--no-compile", "--root-user-action=ignore", "--disable-pip-version-check"]
        run([*command, *wanted])
        new.rename(made)
    return made


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system
        shutil.copy2(source, target, follow_symlinks=False)


def _link_tree(source: Path, target: Path) -> None:
    def link(old: str, new: str) -> None:
        _link(Path(old), Path(new))

    shutil.copytree(source, target, symlinks=True, copy_function=link, dirs_exist_ok=True)
