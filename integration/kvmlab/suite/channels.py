# SPDX-License-Identifier: Apache-2.0
"""Each way to the guest's agent under KVM: the same container, the same bytes."""

from __future__ import annotations

import os

import pytest

from integration.kvmlab.suite.system import command_line, kata_configuration
from integration.lib.kata import Kata

DEVICES = {
    "vhost": '"vhost-vsock-pci"',
    "vhost-user": '"vhost-user-vsock-pci"',
    "serial": '"virtserialport"',
}


@pytest.mark.parametrize("kind", DEVICES)
def test_a_container_through_it(kata: Kata, kind: str) -> None:
    configuration = kata_configuration(f'[hypervisor.qemu]\nvsock = "{kind}"\n')
    container_id = kata.start("sleep", "1000", flags=("--runtime-config-path", configuration))
    words = command_line(kata.pid_of(container_id, "vmm"))
    assert any(DEVICES[kind] in word for word in words)
    done = kata.execute(container_id, "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.stdout, done.returncode) == ("out\n", 7)
    assert "err" in done.stderr
    data = os.urandom(1 << 19).hex().encode()
    assert kata.execute(container_id, "cat", input=data).stdout.encode() == data
    kata.remove(container_id)
