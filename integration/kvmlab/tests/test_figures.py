# SPDX-License-Identifier: Apache-2.0
"""The table of figures."""

from __future__ import annotations

from integration.kvmlab.suite.figures import table


def test_median_and_range_of_each_kind() -> None:
    found = {
        "cold": [{"run": 3.0, "exec": 1.0}, {"run": 1.0}, {"run": 2.0}],
        "clone": [{"run": 0.5, "late": 4.0}],
    }
    assert table(found).splitlines() == [
        "| | cold | clone |",
        "| --- | --- | --- |",
        "| run | 2.00 (1.00–3.00) | 0.50 (0.50–0.50) |",
        "| exec | 1.00 (1.00–1.00) |  |",
        "| late |  | 4.00 (4.00–4.00) |",
    ]
