# SPDX-License-Identifier: Apache-2.0
"""``kata-runtime``: what an administrator asks of this runtime."""

from __future__ import annotations

from .cli import main

__all__ = ["main"]
