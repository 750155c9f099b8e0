# SPDX-License-Identifier: Apache-2.0
"""Each way to the guest's agent under KVM: the same container, the same bytes."""

from __future__ import annotations

import os

import pytest
import trio

from agent.api import health_pb2
from integration.kvmlab.suite.system import command_line, kata_configuration
from integration.lib.kata import Kata
from shimv2.state import vm_dir
from ttrpc.client import Client
from vmm.vsock import VsockRefused, open_channel

_AGENT_PORT, _NOBODY_S_PORT = 1024, 4099

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


def test_the_agent_by_hybrid_vsock(kata: Kata) -> None:
    """As with a VMM that has vsock built in; here the shim plays it, before vhost-vsock."""
    container_id = kata.start("sleep", "1000")

    async def check() -> int:
        socket = vm_dir(container_id) / "hybrid.sock"
        async with open_channel("hybrid", socket.parent, socket=socket) as channel:
            with pytest.raises(VsockRefused):
                await channel.connect(_NOBODY_S_PORT)
            connection = await channel.connect(_AGENT_PORT)
            async with Client(connection.stream) as client:
                answer = await client.stub(health_pb2.DESCRIPTOR.services_by_name["Health"]).Check(
                    health_pb2.CheckRequest(), timeout=60
                )
                return int(answer.status)

    assert trio.run(check) == health_pb2.HealthCheckResponse.SERVING
    kata.remove(container_id)
