# SPDX-License-Identifier: Apache-2.0
"""Tests that run in the lab only; the host's pytest does not collect them (no `test_` names)."""
