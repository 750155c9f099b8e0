# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib

import pytest
from google.protobuf import any_pb2

from shimv2 import bootstrap
from shimv2.api import bootstrap_pb2, mount_pb2, runc_options_pb2, runtime_options_pb2, task_v2_pb2


def packed(message, kind: str) -> bytes:
    return any_pb2.Any(type_url=kind, value=message.SerializeToString()).SerializeToString()


def options(path: str, kind: str = "runtimeoptions.v1.Options") -> bytes:
    return packed(runtime_options_pb2.Options(config_path=path), kind)


def params(**changes) -> bytes:
    values = {
        "instance_id": "c1",
        "namespace": "ns",
        "containerd_ttrpc_address": "/run/c.sock.ttrpc",
        "containerd_grpc_address": "/run/c.sock",
        "log_level": bootstrap_pb2.LOG_LEVEL_DEBUG,
        **changes,
    }
    message = bootstrap_pb2.BootstrapParams(**values)
    message.extensions.add().value.ParseFromString(options("/etc/x.toml"))
    return message.SerializeToString()


def test_bootstrap_params_are_read():
    found = bootstrap.parse_params(params(socket_dir="/run/s"), "c1", "ns")
    assert found.rich
    assert found.debug
    assert found.ttrpc_address == "/run/c.sock.ttrpc"
    assert found.grpc_address == "/run/c.sock"
    assert found.socket_dir == "/run/s"
    assert bootstrap.config_path_of(found.options) == ("/etc/x.toml", True)


@pytest.mark.parametrize("change", [{"instance_id": "other"}, {"namespace": "other"}])
def test_params_of_another_container_are_taken_for_an_any(change):
    data = params(**change)
    found = bootstrap.parse_params(data, "c1", "ns")
    assert not found.rich
    assert found.options == data


@pytest.mark.parametrize("kind", bootstrap.RUNTIME_OPTIONS_TYPES)
def test_bare_options_of_older_containerd(kind):
    data = options("/x.toml", kind)
    found = bootstrap.parse_params(data, "c1", "ns")
    assert (found.rich, found.options) == (False, data)
    assert bootstrap.config_path_of(data) == ("/x.toml", True)


def test_runc_options_and_rubbish_name_no_config():
    runc = packed(runc_options_pb2.Options(root="/run/runc"), "containerd.runc.v1.Options")
    assert bootstrap.config_path_of(runc) == ("", False)
    assert bootstrap.config_path_of(b"\xff\xff\xff") == ("", False)
    assert bootstrap.config_path_of(b"") == ("", True)
    assert not bootstrap.parse_params(b"\xff\xff", "c1", "ns").rich
    assert not bootstrap.parse_params(b"", "c1", "ns").rich


def test_the_rich_answer_is_a_bootstrap_result():
    address = "unix:///run/containerd/s/" + "0" * 64
    result = bootstrap_pb2.BootstrapResult.FromString(
        bootstrap.answer(address, rich=True, json_answer=False)
    )
    assert (result.version, result.address, result.protocol) == (3, address, "ttrpc")
    (extension,) = result.extensions
    able = mount_pb2.MountCapabilities()
    assert extension.value.Unpack(able)
    assert list(able.types) == ["erofs"]
    assert list(able.transforms) == ["format", "mkdir"]


def test_plain_and_json_answers():
    assert bootstrap.answer("unix:///a", rich=False, json_answer=False) == b"unix:///a"
    text = bootstrap.answer("unix:///a", rich=False, json_answer=True)
    assert text == b'{"version":3,"address":"unix:///a","protocol":"ttrpc"}'


def test_socket_path_is_the_digest_of_address_namespace_group():
    digest = hashlib.sha256(b"/run/c.sock/ns/pod").hexdigest()
    assert bootstrap.socket_path("/run/c.sock", "ns", "pod") == f"/run/containerd/s/{digest}"
    assert bootstrap.socket_path("/run/c.sock", "ns", "pod", "/d") == f"/d/{digest}"


def test_a_delete_response_is_one():
    now = 1_700_000_000_123_456_789
    answer = task_v2_pb2.DeleteResponse.FromString(bootstrap.delete_response(4711, 137, now))
    assert (answer.pid, answer.exit_status) == (4711, 137)
    assert answer.exited_at.ToNanoseconds() == now
