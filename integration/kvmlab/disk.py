# SPDX-License-Identifier: Apache-2.0
"""The lab machine's disk, kernel and initrd: Debian packages, kept by digest of what made them."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from guestbuild import digest, sources
from guestbuild.apt import Apt, acquire_options
from guestbuild.command import run
from guestbuild.debian_kernel import write_initrd
from guestbuild.lock import locked
from guestbuild.progress import Progress

HERE = Path(__file__).resolve().parent
DESCRIPTION = HERE / "lab.yaml"
LIBRARY = "usr/local/lib/pykata-lab"
_UNIT = "files/pykata-lab.service"
_PROGRAMS = ("__init__.py", "inside.py", "wire.py")


@dataclasses.dataclass(frozen=True)
class Release:
    """What a lab of one Debian release is made of."""

    suite: str
    python: str
    packages: tuple[str, ...]
    kernel: str
    modules: tuple[str, ...]
    exclude: tuple[str, ...]
    exclude_modules: tuple[str, ...]
    size_mib: int
    mask: tuple[str, ...]
    components: tuple[str, ...] = ("main",)
    mirror: str | None = None
    security_mirror: str | None = None


@dataclasses.dataclass(frozen=True)
class Disk:
    """Three files that boot."""

    release: Release
    image: Path
    kernel: Path
    initrd: Path


def releases(path: Path = DESCRIPTION) -> dict[str, Release]:
    """By name, the first one being the usual one."""
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    return {
        suite: Release(
            suite=suite,
            python=own["python"],
            packages=(*data["packages"], *own["packages"]),
            kernel=data["kernel"],
            modules=tuple(data["modules"]),
            exclude=tuple(data["exclude"]),
            exclude_modules=tuple(data["exclude_modules"]),
            size_mib=data["size_mib"],
            mask=tuple(data["mask"]),
        )
        for suite, own in data["releases"].items()
    }


def build(release: Release, cache: Path, progress: Progress) -> Disk:
    """The disk of a release; from the cache if it is there.

    Raises:
        BuildError: a package or a program is missing, or the mirror can't be reached.
    """
    archive = sources.archive(release)
    files = [(name, HERE / name) for name in (_UNIT, *_PROGRAMS, "disk.py")]
    key = digest.of_value(
        [
            dataclasses.asdict(release),
            archive.lines,
            digest.of_tree(files),
            digest.of_builder("apt", "cpio", "debian_kernel"),
        ]
    )
    folder = cache / "kvmlab" / key
    disk = Disk(release, folder / "disk.ext4", folder / "vmlinuz", folder / "initrd.img")
    with locked(cache, f"kvmlab-{key}", progress):
        if not folder.exists():
            _make(release, archive, cache, folder, progress)
    return disk


def _make(
    release: Release, archive: sources.Archive, cache: Path, folder: Path, progress: Progress
) -> None:
    # Not in the cache's "work", which a build of a kernel empties.
    prefix = f"making-{folder.name}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{prefix}*"):  # by a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        root, made = Path(scratch, "root"), Path(scratch, "made")
        made.mkdir()
        with progress.step(f"lab: {len(release.packages)} packages of {release.suite}"):
            _bootstrap(release, archive, cache, root)
        with progress.step(f"lab: {release.kernel}"):
            _add_kernel(release, Apt(archive, cache), cache, root, made)
        _configure(release, root)
        with progress.step("lab: its disk"):
            image = made / "disk.ext4"
            with image.open("wb") as file:
                file.truncate(release.size_mib << 20)
            options = ["-t", "ext4", "-q", "-F", "-O", "^has_journal,^metadata_csum"]
            run(["/sbin/mke2fs", *options, "-d", root, image])
        made.rename(folder)


def _bootstrap(release: Release, archive: sources.Archive, cache: Path, root: Path) -> None:
    options = [
        "--variant=minbase",
        "--mode=root",
        # Else now and then usrmerge is chosen for it, which can't be installed before dpkg is.
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        f"--include={','.join(('usr-is-merged', *release.packages))}",
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in release.exclude),
        *(f"--aptopt={line}" for line in acquire_options()),
    ]
    log = cache / "logs" / f"kvmlab-{release.suite}.log"
    run(["mmdebstrap", *options, archive.suite, root, *archive.lines], log=log)


def _add_kernel(release: Release, apt: Apt, cache: Path, root: Path, made: Path) -> None:
    """Unpack the kernel without its maintainer's scripts: the initrd is one of our own."""
    if not apt.ready():
        apt.update()
    image = next(name for name in apt.depends(release.kernel) if name.startswith("linux-image-"))
    deb = apt.download(apt.candidate(image), cache / "debs")
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        package = Path(scratch)
        run(["dpkg-deb", "--extract", deb, package])
        (kernel,) = (package / "boot").glob("vmlinuz-*")
        shutil.copyfile(kernel, made / "vmlinuz")
        (modules,) = [*package.glob("lib/modules/*"), *package.glob("usr/lib/modules/*")]
        busybox = (root / "bin/busybox").read_bytes()
        write_initrd(modules, busybox, release.modules, made / "initrd.img")
        for name in release.exclude_modules:
            shutil.rmtree(modules / "kernel" / name)
        target = root / "usr/lib/modules" / modules.name
        target.parent.mkdir(exist_ok=True)
        shutil.move(modules, target)
    run(["/usr/sbin/chroot", root, "/sbin/depmod", target.name])


def _configure(release: Release, root: Path) -> None:
    """A machine without network, logins or waiting; the channel to its owner."""
    (root / "etc/hostname").write_text("kvmlab\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost kvmlab\n::1 localhost\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 defaults,noatime 0 0\n")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    library = root / LIBRARY / "integration/kvmlab"
    library.mkdir(parents=True)
    for name in _PROGRAMS:
        shutil.copyfile(HERE / name, library / name)
    units = root / "etc/systemd/system"
    unit = Path(_UNIT).name
    shutil.copyfile(HERE / _UNIT, units / unit)
    systemctl: list[str | Path] = ["/usr/sbin/chroot", root, "systemctl", "--quiet"]
    run([*systemctl, "enable", unit, "containerd.service"])
    run([*systemctl, "mask", *release.mask])
