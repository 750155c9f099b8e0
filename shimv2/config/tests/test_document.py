# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shimv2.config import ConfigError, document, load_config

TREE = Path(__file__).parents[3]


def test_the_sample_is_the_defaults(load):
    empty = load("")
    config = load(document.sample({}))
    assert config.warnings == ()
    assert config == empty


def test_the_sample_with_every_line_in_force(load):
    text = "\n".join(
        line[1:] if line.startswith("#") and line[1:2].isalpha() else line
        for line in document.sample({}).splitlines()
    )
    assert "\ndefault_memory = 2048" in text
    config = load(text)
    assert config.warnings == ()
    assert replace(config, source=None) == replace(load(""), source=None)


def test_values_are_set_and_checked(tmp_path, capsys):
    assert document.main(["toml", "hypervisor.qemu.kernel=/k x", "runtime.enable_debug=true"]) == 0
    file = tmp_path / "configuration.toml"
    file.write_text(capsys.readouterr().out)
    config = load_config(file, {})
    assert config.hypervisor.kernel == Path("/k x")
    assert config.runtime.enable_debug is True
    with pytest.raises(ConfigError, match="expected an absolute path"):
        document.sample({"hypervisor.qemu": {"kernel": "vmlinux"}})
    with pytest.raises(ConfigError, match="no such key"):
        document.main(["toml", "hypervisor.qemu.kernal=/x"])


def test_the_reference_in_the_documentation_is_up_to_date(tmp_path):
    page = TREE / "docs/configuration.md"
    copy = tmp_path / "configuration.md"
    copy.write_text(page.read_text())
    document.update(copy)
    assert copy.read_text() == page.read_text(), "run: make docs"


def test_usage(capsys):
    assert document.main([]) == 2
    assert "document toml" in capsys.readouterr().err
