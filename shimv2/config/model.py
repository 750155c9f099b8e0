# SPDX-License-Identifier: Apache-2.0
"""The whole configuration as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .agent import AgentConfig
from .factory import FactoryConfig
from .hypervisor import HypervisorConfig
from .runtime import RuntimeConfig


@dataclass(frozen=True)
class Config:
    """What one sandbox is made by.

    Attributes:
        source: the configuration.toml read, symlinks resolved; None for built-in defaults.
        drop_ins: files of ``config.d`` in the order they were applied.
        warnings: sentences to log once per sandbox.
    """

    hypervisor: HypervisorConfig = field(default_factory=HypervisorConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    factory: FactoryConfig = field(default_factory=FactoryConfig)
    source: Path | None = None
    drop_ins: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
