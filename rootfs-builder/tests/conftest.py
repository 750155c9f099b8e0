# SPDX-License-Identifier: Apache-2.0
"""The builder is a folder with a dash in its name: its package is put on the path here."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
