# SPDX-License-Identifier: Apache-2.0
"""``kata-monitor``: the figures of all sandboxes of a host, for Prometheus."""

from __future__ import annotations

from .cli import main

__all__ = ["main"]
