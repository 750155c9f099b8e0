# SPDX-License-Identifier: Apache-2.0
"""Debian's cloud kernel instead of a build: its vmlinux, and an initrd that loads its modules."""

from __future__ import annotations

import lzma
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from guestbuild import bzimage, cpio, digest, image
from guestbuild.apt import Apt, Candidate
from guestbuild.command import run
from guestbuild.description import Kernel
from guestbuild.errors import BuildError
from guestbuild.kernel import BuiltKernel
from guestbuild.progress import Progress

# The initrd's PID 1: loads all modules, mounts the root that the command line names, and hands
# over. {modules} is one insmod a line.
_INIT = """\
#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev 2>/dev/null
{modules}
root=/dev/vda1 type=erofs flags=ro
for word in $($bb cat /proc/cmdline); do
  case $word in
    root=*) root=${{word#root=}} ;;
    rootfstype=*) type=${{word#rootfstype=}} ;;
  esac
done
left=100
while [ ! -b "$root" ] && [ $left -gt 0 ]; do
  $bb usleep 20000
  left=$((left - 1))
done
$bb mount -t "$type" -o "$flags" "$root" /root || $bb echo "initrd: no root at $root"
$bb mount -o move /dev /root/dev
$bb umount /sys
$bb umount /proc
exec $bb switch_root /root /sbin/init
"""


def take(
    kernel: Kernel, apt: Apt, package: Candidate, cache: Path, progress: Progress
) -> BuiltKernel:
    """Unpack the kernel package, or take it from the cache.

    Raises:
        BuildError: A module isn't there; the package has no kernel.
    """
    key = digest.of_value(
        [package.version, kernel.modules, digest.of_builder("bzimage", "debian_kernel", "cpio")]
    )
    folder = cache / "kernel" / key
    modules_digest = digest.of_value(kernel.modules)
    result = BuiltKernel(folder / "vmlinux", package.version, modules_digest, folder / "initrd.img")
    if result.vmlinux.exists():
        progress.note(f"kernel {package.version} {key}: as taken before")
        return result
    (cache / "work").mkdir(parents=True, exist_ok=True)
    with (
        progress.step(f"kernel {package.version} of Debian"),
        tempfile.TemporaryDirectory(dir=cache / "work", prefix="debian-kernel-") as scratch,
    ):
        unpacked = Path(scratch) / "package"
        image_name = next(name for name in apt.depends(package.name) if "linux-image" in name)
        for name in (image_name, "busybox-static"):
            deb = apt.download(apt.candidate(name), cache / "debs")
            run(["dpkg-deb", "--extract", deb, unpacked])
        built = Path(scratch) / "built"
        built.mkdir()
        (compressed,) = (unpacked / "boot").glob("vmlinuz-*")
        try:
            plain = bzimage.vmlinux(compressed.read_bytes())
        except ValueError as error:
            raise BuildError(f"{compressed.name}: {error}") from error
        (built / "vmlinux").write_bytes(plain)
        (modules,) = (unpacked / "usr/lib/modules").glob("*")
        busybox = (unpacked / "usr/bin/busybox").read_bytes()
        write_initrd(modules, busybox, kernel.modules, built / "initrd.img")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)
    return result


def load_order(wanted: Iterable[str], needs: Callable[[str], list[str]]) -> list[str]:
    """Modules in an order in which each comes after those it needs.

    Args:
        wanted: Modules' names, with `_` or `-`.
        needs: What a module needs; all names it gets and gives have `_`.
    """
    order: list[str] = []

    def add(name: str) -> None:
        if name in order:
            return
        for need in needs(name):
            add(need)
        order.append(name)

    for name in wanted:
        add(name.replace("-", "_"))
    return order


def write_initrd(tree: Path, busybox: bytes, wanted: tuple[str, ...], target: Path) -> None:
    """An initrd that loads modules and goes on with the root that the command line names.

    Args:
        tree: The kernel package's folder of modules.

    Raises:
        BuildError: A wanted module isn't there.
    """
    paths = {_name(path): path for path in tree.rglob("*.ko*")}
    builtin = {_name(Path(line)) for line in (tree / "modules.builtin").read_text().split()}
    try:
        names = load_order(
            [name for name in wanted if name.replace("-", "_") not in builtin],
            lambda name: _needs(paths[name]),
        )
    except KeyError as error:
        raise BuildError(f"kernel.modules: the kernel package has no {error.args[0]}") from error
    plain = target.with_suffix(".cpio")
    with plain.open("wb") as stream:
        archive = cpio.Writer(stream)
        for directory in ("bin", "dev", "proc", "sys", "root", "modules"):
            archive.directory(directory)
        archive.device("dev/console", 5, 1)
        archive.file("bin/busybox", busybox, 0o755)
        for name in names:
            archive.file(f"modules/{name}.ko", _module(paths[name]))
        lines = "\n".join(f"$bb insmod /modules/{name}.ko" for name in names)
        archive.file("init", _INIT.format(modules=lines).encode(), 0o755)
        archive.close()
    image.compress(plain, target, "zstd")
    plain.unlink(missing_ok=True)


def _name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _module(path: Path) -> bytes:
    """A module's ELF file, uncompressed."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _needs(path: Path) -> list[str]:
    """Modules that a module names in its `depends=` (hard) and `softdep=` (pre:) lines."""
    needs: list[str] = []
    for entry in _module(path).split(b"\0"):
        if entry.startswith(b"depends=") and entry.isascii():
            needs += [name for name in entry[8:].decode().split(",") if name]
    return [name.replace("-", "_") for name in needs]
