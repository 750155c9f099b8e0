# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration, said to the user who wrote it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration file, drop-in or annotation that can't be used.

    The message is one sentence that names the file (or annotation), the key, the value found
    and what was expected.  At the shim's API it becomes INVALID_ARGUMENT.
    """
