# SPDX-License-Identifier: Apache-2.0
"""Sandboxes that are clones of a template, as `ctr` users and tenants see them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.lib.containerd import RUNTIME
from integration.lib.images import BUSYBOX_REFERENCE
from integration.lib.kata import Kata, wait_until
from integration.lib.templates import MADE_WITHIN, Templates, console, kind_of, started

# Printed by a guest's debug console.  What was read before the save would be the same in clones.
_IDENTITY = """
echo machine=$(cat /etc/machine-id)
echo boot=$(cat /proc/sys/kernel/random/boot_id)
echo random=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ')
echo cid=$(python3 -c "import fcntl,struct
print(*struct.unpack('I', fcntl.ioctl(open('/dev/vsock'), 0x7b9, bytes(4))))")
echo mac=,$(cat /sys/class/net/*/address | tr '\\n' ,)
echo date=$(date +%s)
echo forked=$(dmesg | grep -c 'virtual machine fork')
exit
"""


@pytest.fixture
def made(templates: Templates) -> Templates:
    """The same, with a template in it."""
    done = templates.command("init")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("vm factory initialized\n")
    return templates


def test_the_first_boots_and_the_next_are_clones(kata: Kata, templates: Templates) -> None:
    first = kata.start("sleep", "1000", flags=templates.flags)
    assert started(kata, first) == "cold"
    templates.wait_made()
    assert "ready" in templates.command("status").stdout
    second = kata.start("sleep", "1000", flags=templates.flags)
    assert started(kata, second) == "template"
    assert kata.execute(second, "echo", "alive").stdout == "alive\n"
    assert kata.execute(first, "echo", "alive").stdout == "alive\n"


@pytest.mark.one_edition
def test_a_host_of_short_containers_gets_its_template_too(kata: Kata, templates: Templates) -> None:
    kata.run("true", flags=templates.flags)  # gone before the template can be ready
    templates.wait_made()
    container = kata.new_id()
    kata.run("true", flags=templates.flags, container_id=container)
    assert kind_of(kata.containerd, container) == "template"


@pytest.mark.one_edition
def test_made_by_hand_only_if_so_configured(kata: Kata, templates: Templates) -> None:
    templates.set("factory", template_autocreate=False)
    kata.run("true", flags=templates.flags)
    assert not templates.path.exists()
    assert templates.command("init").returncode == 0
    container = kata.new_id()
    kata.run("true", flags=templates.flags, container_id=container)
    assert kind_of(kata.containerd, container) == "template"
    again = templates.command("status").stdout
    assert again.splitlines()[0] == "vm factory is on"
    assert "(this configuration)" in again


def test_what_is_not_enabled_is_not_made(templates: Templates) -> None:
    templates.set("factory", enable_template=False)
    done = templates.command("init")
    assert done.returncode == 1
    assert "enable_template = true" in done.stderr
    assert templates.command("status").stdout.startswith("vm factory is off\n")


def test_a_clone_does_all_that_a_container_does(kata: Kata, made: Templates) -> None:
    data = os.urandom(1 << 20)
    done = kata.run("sh", "-c", "cat | wc -c; exit 7", flags=made.flags, check=False, input=data)
    assert (done.stdout.strip(), done.returncode) == (str(1 << 20), 7)
    container = kata.start("sleep", "1000", flags=made.flags)
    assert kata.execute(container, "sh", "-c", "echo x > /f; cat /f").stdout == "x\n"
    kata.ctr("task", "kill", "-s", "SIGKILL", container)
    wait_until(lambda: kata.status(container) == "STOPPED", 10, "it is stopped")
    assert kata.delete(container) == 137


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Two network namespaces with the two ends of a veth in each."""
    names = [f"{Kata.mark}{number}" for number in range(2)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            ends = ("eth0", "type", "veth", "peer", "name", "eth1")
            subprocess.run(["ip", "-n", name, "link", "add", *ends], check=True)
            for number, end in enumerate(("eth0", "eth1"), 1):
                address = ("add", f"192.0.2.{number}/24", "dev", end)
                subprocess.run(["ip", "-n", name, "address", *address], check=True)
                subprocess.run(["ip", "-n", name, "link", "set", end, "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.one_edition
def test_clones_share_nothing_that_identifies(
    kata: Kata, made: Templates, prefix: Path, networks: list[str]
) -> None:
    containers = [
        kata.start("sleep", "1000", flags=(*made.flags, "--with-ns", f"network:/run/netns/{name}"))
        for name in networks
    ]
    assert [started(kata, container) for container in containers] == ["template"] * 2
    one, two = (console(prefix, container, _IDENTITY) for container in containers)
    assert set(one) == {"machine", "boot", "random", "cid", "mac", "date", "forked"}
    for name in ("machine", "boot", "random", "cid"):
        assert len(one[name]) > 4, f"no {name}"
        assert one[name] != two[name], f"both have the {name} {one[name]}"
    assert len(one["machine"]) == 32
    macs = [set(facts["mac"].split(",")) - {"", "00:00:00:00:00:00"} for facts in (one, two)]
    assert [len(addresses) for addresses in macs] == [2, 2]
    assert not macs[0] & macs[1]
    for facts in (one, two):
        assert int(facts["forked"]) >= 1, "the kernel heard of the clone (vmgenid)"
        assert abs(int(facts["date"]) - time.time()) < 30


@pytest.mark.one_edition
def test_random_bytes_of_containers_differ(kata: Kata, made: Templates) -> None:
    command = ("od", "-An", "-tx1", "-N64", "/dev/urandom")
    seen = {kata.run(*command, flags=made.flags).stdout for _ in range(3)}
    assert len(seen) == 3


class Victim:
    """A template to be damaged more than once, and what is logged of it meanwhile."""

    def __init__(self, kata: Kata, made: Templates, place: Path) -> None:
        made.set("factory", template_autocreate=False)
        self.path = made.wait_made()
        self._kata = kata
        self._kept = place / "template"
        self._copy(self.path, self._kept)

    def restore(self) -> Path:
        if not self.path.exists():
            self._copy(self._kept, self.path)
        self._logged = len(self._kata.containerd.log.read_text())
        return self.path

    def warnings(self) -> str:
        """The lines that name it, since it was whole."""
        lines = self._kata.containerd.log.read_text()[self._logged :].splitlines()
        return "\n".join(line for line in lines if f"template {self.path.name[:12]}" in line)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True)


@pytest.fixture
def victim(kata: Kata, made: Templates, tmp_path: Path) -> Victim:
    return Victim(kata, made, tmp_path)


def other_state(template: Path) -> None:
    data = bytearray((template / "state").read_bytes())
    data[len(data) // 2] ^= 1
    (template / "state").write_bytes(data)


def short_memory(template: Path) -> None:
    os.truncate(template / "memory", 1 << 20)


def other_memory(template: Path) -> None:
    """No checksum is made of it: such a clone does not answer."""
    size = (template / "memory").stat().st_size
    os.truncate(template / "memory", 0)
    os.truncate(template / "memory", size)


def half_written(template: Path) -> None:
    (template / "template.json").unlink()


@pytest.mark.one_edition
def test_a_damaged_template_costs_a_boot_and_a_warning(
    kata: Kata, made: Templates, victim: Victim
) -> None:
    for damage in (other_state, short_memory, other_memory, half_written):
        damage(victim.restore())
        container = kata.new_id()
        done = kata.run("echo", "ran", flags=made.flags, container_id=container)
        assert done.stdout == "ran\n", damage.__name__
        assert kind_of(kata.containerd, container) == "cold", damage.__name__
        assert "warning" in victim.warnings(), damage.__name__
        assert not victim.path.exists(), damage.__name__


def deleted(template: Path) -> None:
    shutil.rmtree(template)


def overwritten(template: Path) -> None:
    """In place, so that who has it open sees it."""
    with (template / "state").open("r+b") as state:
        state.write(bytes((template / "state").stat().st_size))
    os.truncate(template / "memory", 0)


@pytest.mark.one_edition
def test_a_template_lost_while_it_is_cloned(kata: Kata, made: Templates, victim: Victim) -> None:
    """Once its VMM runs a clone has been found good, and its state is not read yet."""
    for fault in (deleted, overwritten):
        template = victim.restore()
        container = kata.new_id()
        process = kata.popen(
            *("run", "--rm", "--runtime", RUNTIME, *made.flags, BUSYBOX_REFERENCE, container),
            *("echo", "ran"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        wait_until(lambda name=container: clones(name), 60, "a clone's VMM is started")
        fault(template)
        output, _ = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, b"ran\n"), fault.__name__
        assert kind_of(kata.containerd, container) == "cold", fault.__name__
        assert "could not be used" in victim.warnings(), fault.__name__
        assert not template.exists(), "the next one would try it again"


def clones(container: str) -> bool:
    """Whether there is a VMM that waits for the state of a template."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes()
            if f"sandbox-{container},".encode() in command and b"-incoming" in command:
                return True
    return False


@pytest.mark.one_edition
def test_two_kernels_at_once(kata: Kata, made: Templates, directory: Path, prefix: Path) -> None:
    """Another configuration is another template: of a kernel that calls itself differently, and
    of another size; each sandbox gets what is its own."""
    kernel = (prefix / "share/kata-containers/vmlinux.container").read_bytes()
    match = re.search(rb"Linux version (\S+)", kernel)
    assert match is not None
    release = match[1]
    renamed = release[:-1] + b"X"
    other = directory / "vmlinux"
    other.write_bytes(kernel.replace(release, renamed))
    made.set("hypervisor.qemu", default_memory=1024, kernel=str(other))
    first = kata.start("sleep", "1000", flags=made.flags)
    assert started(kata, first) == "cold"
    wait_until(lambda: len(made.ready()) == 2, MADE_WITHIN, "the second template is made")
    second = kata.start("sleep", "1000", flags=made.flags)
    made.unset("hypervisor.qemu", "default_memory", "kernel")
    third = kata.start("sleep", "1000", flags=made.flags)
    assert [started(kata, clone) for clone in (second, third)] == ["template"] * 2
    for container, name, small in (
        (first, renamed, True),
        (second, renamed, True),
        (third, release, False),
    ):
        facts = kata.execute(container, "sh", "-c", "uname -r; grep MemTotal /proc/meminfo").stdout
        words = facts.split()
        assert words[0] == name.decode()
        assert (int(words[2]) < 1 << 20) is small


@pytest.mark.one_edition
def test_a_replaced_image_is_another_template(
    kata: Kata, made: Templates, directory: Path, prefix: Path
) -> None:
    image = directory / "kata-containers.img"
    shutil.copy(prefix / "share/kata-containers/kata-containers.img", image)
    made.set("hypervisor.qemu", image=str(image))
    assert made.command("init").returncode == 0
    with image.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(first)
    container = kata.new_id()
    kata.run("true", flags=made.flags, container_id=container)
    assert kind_of(kata.containerd, container) == "cold"


@pytest.mark.one_edition
def test_a_killed_maker_harms_nobody(kata: Kata, templates: Templates) -> None:
    container = kata.start("sleep", "1000", flags=templates.flags)
    pid = wait_for_maker(templates)
    os.kill(pid, signal.SIGKILL)
    assert kata.execute(container, "echo", "alive").stdout == "alive\n"
    # The next sandbox finds neither template nor maker, and has another try made.
    kata.run("true", flags=templates.flags)
    templates.wait_made()


@pytest.mark.one_edition
def test_destroy_ends_a_maker(kata: Kata, templates: Templates) -> None:
    kata.start("sleep", "1000", flags=templates.flags)
    pid = wait_for_maker(templates)
    done = templates.command("destroy")
    assert done.stdout.splitlines() == [
        f"ended the maker of a template, process {pid}",
        "vm factory destroyed",
    ]
    assert not Path(f"/proc/{pid}").exists() or is_zombie(pid)


@pytest.mark.one_edition
def test_no_room_for_a_template_is_no_failure(kata: Kata, made: Templates) -> None:
    made.command("destroy")
    made.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", made.path], check=True)
    try:
        kata.run("true", flags=made.flags)

        def failed() -> list[Any]:
            return list(made.path.glob("*.failed"))

        wait_until(lambda: bool(failed()), MADE_WITHIN, "the maker gives up")
        wait_until(lambda: not list(made.path.glob("*.lock")), 20, "the maker is gone")
        assert "No space left" in failed()[0].read_text()
        assert "failed" in made.command("status").stdout
        assert not list(made.path.glob("*.new"))
    finally:
        subprocess.run(["umount", made.path], check=True)


def wait_for_maker(templates: Templates) -> int:
    """The pid of the maker as soon as there is one."""
    found: list[int] = []

    def running() -> bool:
        for lock in templates.path.glob("*.lock"):
            text = lock.read_text().strip()
            found[:] = [int(text)] if text else []
        return bool(found)

    wait_until(running, 60, "a maker runs")
    return found[0]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
