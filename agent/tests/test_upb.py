# SPDX-License-Identifier: Apache-2.0
"""The stand-ins are tried in an interpreter of their own: they would spoil this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from ttrpc import upb
fast = upb.install() if sys.argv[1] == "fast" else False
from google.protobuf import any_pb2, empty_pb2
from agent.api import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2
for module in (agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2):
    for name, message in sorted(module.DESCRIPTOR.message_types_by_name.items()):
        cls = getattr(module, name)
        assert cls.DESCRIPTOR is message
        print(name, [(f.name, f.number, f.type) for f in cls.DESCRIPTOR.fields], cls())
    for name, enum in sorted(module.DESCRIPTOR.enum_types_by_name.items()):
        print(name, [(key, getattr(module, key)) for key in getattr(module, name).keys()])
    for name, service in sorted(module.DESCRIPTOR.services_by_name.items()):
        print(name, [(m.name, m.input_type.full_name) for m in service.methods])
request = agent_pb2.CreateContainerRequest(container_id="c1", devices=[agent_pb2.Device(id="x")])
request.OCI.Annotations["a"] = "b"
request.OCI.Linux.Devices.add(Path="/dev/x", Major=7)
request.storages.add(fs_group=agent_pb2.FSGroup(group_change_policy=types_pb2.OnRootMismatch))
again = agent_pb2.CreateContainerRequest.FromString(request.SerializeToString())
assert again == request
print(again)
usage = csi_pb2.VolumeUsage(unit=csi_pb2.VolumeUsage.INODES)
print(usage, health_pb2.HealthCheckResponse.SERVING, empty_pb2.Empty().SerializeToString())
packed = any_pb2.Any(type_url="t/x", value=b"y")
print(packed)
try:
    agent_pb2.Device.FromString(b"\\xff")
except Exception as error:
    print(type(error).__name__)
print("loaded", fast, "re" in sys.modules, file=sys.stderr)
"""


def _run(how: str) -> tuple[str, str]:
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}",
            how,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_messages_are_the_same_either_way() -> None:
    fast, loaded = _run("fast")
    slow, _ = _run("slow")
    assert loaded.startswith("loaded True")
    assert fast == slow


def test_too_late_changes_nothing() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from google.protobuf import descriptor_pool, text_format\n"
        "from ttrpc import upb\n"
        "assert not upb.install()\n"
        "from agent.api import agent_pb2\n"
        "assert text_format.MessageToString(agent_pb2.Device(id='x')) == 'id: \"x\"\\n'\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
