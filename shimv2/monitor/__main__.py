# SPDX-License-Identifier: Apache-2.0
"""``python -m shimv2.monitor``, in a source tree."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
