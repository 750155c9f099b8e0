# SPDX-License-Identifier: Apache-2.0
"""Writes configuration files for a test and loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shimv2.config import Config, load_config

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """``load(text, **drop_ins)``: write configuration.toml and config.d files, load them.

    A drop-in's argument name becomes its file name (``a_toml`` is ``a.toml``)."""

    def write_and_load(text: str = "", **drop_ins: str) -> Config:
        main = tmp_path / "configuration.toml"
        main.write_text(text)
        for name, content in drop_ins.items():
            directory = tmp_path / "config.d"
            directory.mkdir(exist_ok=True)
            (directory / name.replace("_", ".")).write_text(content)
        return load_config(main, {})

    return write_and_load
