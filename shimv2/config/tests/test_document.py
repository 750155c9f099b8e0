# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shimv2.config import ConfigError, document, load_config
from shimv2.config.keys import Support, keys_of

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


def test_a_key_is_called_supported_only_if_someone_reads_it():
    """Reads outside of this package, but for the keys that only this package itself needs."""
    here = TREE / "shimv2/config"
    code = "\n".join(
        file.read_text()
        for room in ("shimv2", "vmm")
        for file in (TREE / room).rglob("*.py")
        if here not in file.parents and not {"tests", "runtime_cli"} & set(file.parts)
    )
    own = {"enable_annotations", "hypervisor_name", "log_level"}
    unread = [
        f"{name}.{item.name}"
        for name, section in document.SECTIONS.items()
        for item, key in keys_of(section)
        if key.support is Support.YES
        and "Q" in key.vmms
        and item.name not in own
        and not item.name.startswith("valid_")
        and f".{item.name}" not in code
    ]
    assert unread == []
