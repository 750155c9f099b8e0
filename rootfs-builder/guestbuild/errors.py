# SPDX-License-Identifier: Apache-2.0
"""The one error that a build ends with."""

from __future__ import annotations


class BuildError(Exception):
    """Something the user can act on; the text says what and, where known, how."""
