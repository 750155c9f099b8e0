# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shimv2 import state
from shimv2.runtime_cli import main
from shimv2.runtime_cli.sandboxes import NoSuchSandboxError, find


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of sandbox records."""
    directory = tmp_path / "sbs"
    monkeypatch.setattr(state, "SANDBOXES", directory)
    return directory


def add_record(name: str) -> state.SandboxRecord:
    record = state.SandboxRecord(name, "default", "/run/containerd.sock", "")
    (state.SANDBOXES / name).mkdir(parents=True)
    record.add_process("shim", os.getpid())
    record.save()
    return record


def test_no_arguments_print_the_usage(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: kata-runtime")


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["check", "--help"]])
def test_version_and_help(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert "kata-runtime" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["frobnicate"], ["exec"], ["exec", "x", "--kata-debug-port", "0"], ["check", "x"]]
)
def test_wrong_usage_is_status_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_default_config_paths(capsys):
    assert main(["--show-default-config-paths"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "/etc/kata-containers/configuration.toml"


def test_a_missing_configuration_is_one_line_and_status_1(capsys):
    assert main(["--config", "/nowhere/x.toml", "env"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "/nowhere/x.toml" in err


def test_env_as_json_and_as_toml_say_the_same(tmp_path, capsys):
    file = tmp_path / "configuration.toml"
    file.write_text('[hypervisor.qemu]\npath = "/nowhere/qemu"\nkernel = "/k"\n')
    assert main(["--config", str(file), "env", "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    assert main(["--config", str(file), "kata-env"]) == 0
    as_toml = tomllib.loads(capsys.readouterr().out)
    for volatile in ("FreeMiB", "AvailableMiB"):
        as_json["Host"]["Memory"].pop(volatile)
        as_toml["Host"]["Memory"].pop(volatile)
    assert as_json == as_toml
    assert as_json["Kernel"]["Path"] == "/k"
    assert as_json["Runtime"]["Config"]["Path"] == str(file)
    assert "No such file" in as_json["Hypervisor"]["Version"]


def test_list(records, capsys):
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    add_record("abc")
    dead = add_record("dead")
    dead.processes["shim"] = (os.getpid(), 1)
    dead.save()
    (records / "broken").mkdir()
    assert main(["ps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["abc", "default", "alive"]
    assert lines[2].split()[:3] == ["dead", "default", "dead"]
    assert main(["list", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["pids"] == {"shim": os.getpid()}
    assert first["pss_bytes"] > 1 << 20


def test_find_by_the_start_of_an_id(records):
    for name in ("abc1", "abc2", "ab"):
        add_record(name)
    assert find("ab") == "ab"
    assert find("abc2") == "abc2"
    for wrong, message in (("abc", "abc1, abc2"), ("x", "there are: ab, abc1"), ("", "there are")):
        with pytest.raises(NoSuchSandboxError, match=message):
            find(wrong)
    with pytest.raises(NoSuchSandboxError):
        find("../ab")


def test_exec_without_such_a_sandbox(records, capsys):
    assert main(["exec", "nope"]) == 1
    assert "no sandbox 'nope' on this host (there are none)" in capsys.readouterr().err


def test_start_up_imports_neither_trio_nor_protobuf():
    tree = Path(__file__).parents[3]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from shimv2.runtime_cli import main\n"
        "main(['--show-default-config-paths'])\n"
        "assert not {'trio', 'google.protobuf'} & set(sys.modules), 'slow imports'\n"
    )
    subprocess.run([sys.executable, "-IS", "-c", code, str(tree)], check=True, capture_output=True)
