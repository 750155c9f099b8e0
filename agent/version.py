# SPDX-License-Identifier: Apache-2.0
"""The agent's version, as Health.Version and GetGuestDetails tell it."""

from __future__ import annotations

VERSION = "0.1.0"
