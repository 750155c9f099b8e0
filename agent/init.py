# SPDX-License-Identifier: Apache-2.0
"""What PID 1 of the guest owes the kernel and the containers before it answers anybody.

`early` is all that has to be there before the RPC listener; each mount costs some ten
microseconds, the imports are what takes time, so it uses none but `agent.syscalls`.
Everything may already be there (devtmpfs by the kernel, all of it under a test harness): done
twice is done once.
"""

from __future__ import annotations

import os

from agent import syscalls as sys_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.cmdline import AgentConfig

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SANDBOX_DIR = "/run/kata-containers/sandbox"
OPEN_FILES = 1 << 20  # the kernel's fs.nr_open; containers without an own limit inherit it
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc")

_SECURE = sys_.MS_NOSUID | sys_.MS_NODEV | sys_.MS_NOEXEC

# (source, target, fstype, flags, data); a file system the kernel lacks is left out if optional
_FIRST = (("proc", "/proc", "proc", _SECURE, ""),)
_REST = (
    ("sysfs", "/sys", "sysfs", _SECURE, ""),
    ("devtmpfs", "/dev", "devtmpfs", sys_.MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", sys_.MS_NOSUID | sys_.MS_NOEXEC, "mode=0620,gid=5"),
    ("tmpfs", "/dev/shm", "tmpfs", _SECURE, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", sys_.MS_NOSUID | sys_.MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", sys_.MS_NOSUID | sys_.MS_NODEV, "mode=1777"),
)
_OPTIONAL = (("mqueue", "/dev/mqueue", "mqueue", _SECURE, ""),)

_DEVICE_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)

_VIEW = "/mnt"  # only until it is the root
_EBUSY = 16
_ENODEV = 19


def mount_proc() -> None:
    """/proc alone, so that the kernel command line can be read."""
    for entry in _FIRST:
        _mount(*entry)


def leave_rootfs(mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Out of an initrd: pivot_root(2), and with it every container, refuses the kernel's own
    rootfs. A read-only view of it becomes the root, as an image's is. Returns whether it did.
    """
    with open(mountinfo, encoding="utf-8", errors="replace") as file:
        if " - rootfs " not in file.readline():
            return False
    sys_.mount("/", _VIEW, "", sys_.MS_BIND | sys_.MS_REC)
    sys_.mount("", _VIEW, "", sys_.MS_REMOUNT | sys_.MS_BIND | sys_.MS_RDONLY)
    os.chdir(_VIEW)
    sys_.mount(".", "/", "", sys_.MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    return True


def early(config: AgentConfig) -> list[str]:
    """Bring the guest up to where containers can be created. Returns warnings to log.

    Raises OSError if a mount that nothing works without fails.
    """
    warnings: list[str] = []
    mount_proc()
    for entry in _REST:
        _mount(*entry)
    for entry in _OPTIONAL:
        try:
            _mount(*entry)
        except OSError as error:
            if error.errno != _ENODEV:
                warnings.append(f"mount {entry[1]}: {error}")
    for target, link in _DEVICE_LINKS:
        if not os.path.lexists(link):
            os.symlink(target, link)
    warnings += mount_cgroups(config)
    try:
        loopback_up()
    except OSError as error:
        warnings.append(f"loopback: {error}")
    os.environ["PATH"] = PATH
    return warnings


def late() -> list[str]:
    """What can wait until the listener is there: limits, directories, the machine's id."""
    warnings: list[str] = []
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    except (OSError, ValueError) as error:
        warnings.append(f"open files limit: {error}")
    try:
        sys_.reboot(sys_.REBOOT_CAD_OFF)
    except OSError as error:
        warnings.append(f"ctrl-alt-del: {error}")
    os.makedirs(SANDBOX_DIR, mode=0o755, exist_ok=True)
    try:
        new_machine_id()
    except OSError as error:
        warnings.append(f"machine id: {error}")
    return warnings


def mount_cgroups(config: AgentConfig, root: str = "/sys/fs/cgroup") -> list[str]:
    """Mount cgroups: version 2 unless version 1 was asked for or is all the kernel has."""
    unified = config.unified_cgroup_hierarchy
    if unified is None:
        unified = _kernel_has("cgroup2")
    if not unified:
        return _mount_cgroups_v1(root)
    try:
        _mount("cgroup2", root, "cgroup2", _SECURE, "nsdelegate,memory_recursiveprot")
    except OSError as error:
        if error.errno != 22:  # EINVAL: an older kernel that lacks one of the options
            raise
        _mount("cgroup2", root, "cgroup2", _SECURE, "")
    return enable_controllers(root)


def enable_controllers(directory: str) -> list[str]:
    """Hand the cgroup v2 controllers that exist in `directory` on to its children."""
    with open(f"{directory}/cgroup.controllers", encoding="utf-8") as file:
        available = file.read().split()
    wanted = [name for name in CONTROLLERS if name in available]
    warnings = []
    control = f"{directory}/cgroup.subtree_control"
    try:
        _write(control, " ".join(f"+{name}" for name in wanted))
    except OSError:  # one bad apple fails the whole line: find it
        for name in wanted:
            try:
                _write(control, f"+{name}")
            except OSError as error:
                warnings.append(f"cgroup controller {name}: {error}")
    return warnings


def _mount_cgroups_v1(root: str) -> list[str]:
    warnings = []
    _mount("tmpfs", root, "tmpfs", _SECURE, "mode=0755")
    with open("/proc/cgroups", encoding="utf-8") as file:
        rows = [line.split() for line in file if not line.startswith("#")]
    for name, _, _, enabled in rows:
        if enabled != "1":
            continue
        directory = f"{root}/{name}"
        os.makedirs(directory, exist_ok=True)
        try:
            _mount("cgroup", directory, "cgroup", _SECURE, name)
        except OSError as error:
            warnings.append(f"cgroup v1 {name}: {error}")
            os.rmdir(directory)
    hierarchy = f"{root}/memory/memory.use_hierarchy"
    if os.path.exists(hierarchy):
        try:
            _write(hierarchy, "1")
        except OSError as error:
            warnings.append(f"{hierarchy}: {error}")
    return warnings


def loopback_up() -> None:
    """Set the interface `lo` up, by ioctl: cheaper than a netlink exchange."""
    import _socket
    import fcntl

    siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 1
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC, 0)
    try:
        # struct ifreq: 16 bytes of name, then the flags as a short, 40 bytes in all
        request = b"lo".ljust(16, b"\0") + bytes(24)
        answer = bytearray(fcntl.ioctl(control.fileno(), siocgifflags, request))
        answer[16] |= iff_up
        fcntl.ioctl(control.fileno(), siocsifflags, bytes(answer))
    finally:
        control.close()


def set_hostname(name: str) -> None:
    """The sandbox's host name, cut to the kernel's 64 bytes."""
    raw = name.encode()[:64]
    sys_.sethostname(raw.decode(errors="ignore"))


def set_dns(lines: list[str], target: str = "/etc/resolv.conf", directory: str = "") -> None:
    """Write `lines` where the guest root can't be written and bind the file over `target`.

    A guest without `target` is left alone: the containers have their own file anyway.
    """
    if not lines or not os.path.exists(target):
        return
    directory = directory or SANDBOX_DIR
    os.makedirs(directory, mode=0o755, exist_ok=True)
    path = f"{directory}/resolv.conf"
    with open(path, "w", encoding="utf-8") as file:
        file.write("".join(line.rstrip("\n") + "\n" for line in lines))
    os.chmod(path, 0o644)
    if not _same_file(path, target):
        sys_.mount(path, target, "", sys_.MS_BIND)


def new_machine_id(target: str = "/etc/machine-id", path: str = "/run/machine-id") -> str:
    """A fresh random id, bound over `target` if there is one; also called after a clone."""
    text = os.urandom(16).hex()
    with open(path, "w", encoding="utf-8") as file:  # in place: the bind mount shows it at once
        file.write(text + "\n")
    os.chmod(path, 0o444)
    if os.path.exists(target) and not _same_file(path, target):
        sys_.mount(path, target, "", sys_.MS_BIND)
    return text


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mount unless the same kind of file system is there already."""
    if _mounted_type(target) == fstype:
        return
    try:
        os.mkdir(target, 0o755)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno != 30:  # EROFS: the image has to bring it, and mount will tell
            raise
    try:
        sys_.mount(source, target, fstype, flags, data)
    except OSError as error:
        if error.errno != _EBUSY:
            raise


def _mounted_type(target: str) -> str:
    """The type of what is mounted last on `target`; empty if nothing is, or /proc isn't yet."""
    found = ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.split(" ")
                if fields[1] == target:
                    found = fields[2]
    except OSError:
        pass
    return found


def _kernel_has(fstype: str) -> bool:
    with open("/proc/filesystems", encoding="utf-8") as file:
        return any(line.split()[-1] == fstype for line in file)


def _same_file(one: str, other: str) -> bool:
    a, b = os.stat(one), os.stat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
