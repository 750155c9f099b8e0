# SPDX-License-Identifier: Apache-2.0
"""The one place with our names and version."""

from __future__ import annotations

VERSION = "0.1.0"
RUNTIME_NAME = "io.containerd.kata.v2"
SHIM_BINARY = "containerd-shim-kata-v2"
