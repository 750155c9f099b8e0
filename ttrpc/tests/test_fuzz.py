# SPDX-License-Identifier: Apache-2.0
"""A bounded, repeatable run of the fuzzer."""

from __future__ import annotations

from ttrpc.tests.fuzz import run_once


def test_fuzz() -> None:
    for seed in range(3000):
        run_once(seed)
