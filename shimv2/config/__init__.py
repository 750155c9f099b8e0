# SPDX-License-Identifier: Apache-2.0
"""configuration.toml, its drop-ins and a pod's annotations, as one frozen value."""

from __future__ import annotations

from .agent import AgentConfig
from .annotations import apply_annotations
from .errors import ConfigError
from .factory import FactoryConfig
from .hypervisor import HypervisorConfig
from .load import load_config
from .model import Config
from .runtime import RuntimeConfig

__all__ = [
    "AgentConfig",
    "Config",
    "ConfigError",
    "FactoryConfig",
    "HypervisorConfig",
    "RuntimeConfig",
    "apply_annotations",
    "load_config",
]
