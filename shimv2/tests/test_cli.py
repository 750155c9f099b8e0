# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shimv2 import cli
from shimv2.api import introspection_pb2


def test_flags_as_go_writes_them():
    args = cli.Arguments(
        ["-namespace", "ns", "-id", "c1", "--address=/run/c.sock", "-debug", "-publish-binary", "x",
         "start"]
    )  # fmt: skip
    assert (args.namespace, args.id, args.address, args.debug) == ("ns", "c1", "/run/c.sock", True)
    assert args.action == "start"


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["-nonsense", "start"], "-nonsense"),
        (["-id"], "-id"),
        (["-namespace", "ns", "-id", "a/b", "start"], "'a/b'"),
        (["-namespace", "ns", "-id", "a" * 300, "start"], "300"),
        (["-namespace", "", "-id", "c1", "start"], "-namespace"),
        (["-namespace", "ns", "-id", ".hidden", "delete"], ".hidden"),
        (["-namespace", "ns", "-id", "..", "delete"], "'..'"),
    ],
)
def test_bad_command_lines_name_the_flag_and_the_value(argv, needle):
    with pytest.raises(cli.UsageError, match=re.escape(needle)):
        cli.run(argv)


def test_no_action_prints_usage(capsys):
    assert cli.run([]) == 1
    assert "usage:" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert cli.run(["-v"]) == 0
    assert cli.run(["-help"]) == 0
    assert "Version:" in capsys.readouterr().out


def test_info_is_a_runtime_info(capfdbinary, monkeypatch):
    monkeypatch.setattr(cli.bootstrap, "read_stdin", lambda: b"")
    assert cli.run(["-info"]) == 0
    info = introspection_pb2.RuntimeInfo.FromString(capfdbinary.readouterr().out)
    assert info.name == "io.containerd.kata.v2"
    assert info.version.version


@pytest.mark.parametrize("key", cli.GROUP_ANNOTATIONS)
def test_the_group_comes_from_the_annotations(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({"annotations": {key: "pod1"}}))
    assert cli.group_of(str(tmp_path), "c1") == "pod1"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"annotations": 3}', '{"annotations": null}'])
def test_a_bundle_that_says_nothing_is_its_own_group(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert cli.group_of(str(tmp_path), "c1") == "c1"


def test_a_group_that_is_no_identifier_is_refused(tmp_path):
    text = json.dumps({"annotations": {"io.kubernetes.cri.sandbox-id": "../../etc"}})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(cli.UsageError, match="etc"):
        cli.group_of(str(tmp_path), "c1")


def test_the_daemon_has_nothing_of_its_parent_but_the_listener():
    inherited, kept = os.pipe()  # as of whoever ran `start`
    os.set_inheritable(inherited, True)
    with socket.socket(socket.AF_UNIX) as listener:
        pid = os.fork()
        if pid == 0:
            cli.only_descriptor(listener.fileno())
            # What is open now, but for the descriptor that lists it.
            found = [fd for fd in range(1024) if _is_open(fd)]
            names = {os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)}
            os._exit(0 if found == [0, 1, 2, listener.fileno()] and names == {"/dev/null"} else 1)
        _, status = os.waitpid(pid, 0)
    for fd in (inherited, kept):
        os.close(fd)
    assert status == 0


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_child_whose_parent_recorded_nothing_does_not_serve(tmp_path, monkeypatch):
    """Else nobody could end it: `delete` knows what the record names."""
    recorded, recorded_write = os.pipe()
    os.close(recorded_write)
    with socket.socket(socket.AF_UNIX) as listener:
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr("shimv2.daemon.serve", lambda **_: 77)
            args = cli.Arguments(["-namespace", "ns", "-id", "c", "start"])
            params = cli.bootstrap.parse_params(b"", "c", "ns")
            cli.serve(args, params, listener, recorded)
        _, status = os.waitpid(pid, 0)
    os.close(recorded)
    assert os.waitstatus_to_exitcode(status) == 1


def test_start_imports_nothing_slow():
    code = "import sys, shimv2.cli, shimv2.state; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(cli.__file__).parents[1],
    )
    slow = {"trio", "google.protobuf", "typing", "dataclasses", "logging", "subprocess", "hashlib"}
    assert not slow & set(done.stdout.split())
