# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md lists what there is, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[3] / "docs"
_NAME = r"kata_[a-z_]+[a-z]"


def documented() -> dict[str, str]:
    """Family → kind, by the tables of docs/metrics.md."""
    found = {}
    for line in (DOCS / "metrics.md").read_text().splitlines():
        cell = line.split("|")[1] if line.startswith("|") else ""
        for name, kind in re.findall(rf"`({_NAME})`(?: \((counter|histogram))?", cell):
            found[name] = kind or "gauge"
        if "(counters)" in cell:
            found.update(dict.fromkeys(re.findall(_NAME, cell), "counter"))
    return found


def expressions(node: Any) -> Iterator[str]:
    """Every PromQL text of a dashboard."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def test_the_dashboard_asks_for_what_there_is() -> None:
    known = documented()
    dashboard = json.loads((DOCS / "grafana/kata.json").read_text())
    asked = {name for text in expressions(dashboard) for name in re.findall(_NAME, text)}
    assert len(asked) > 15
    for name in asked:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or known.get(base) == "histogram", name


def test_panels_do_not_lie_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads((DOCS / "grafana/kata.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        box = panel["gridPos"]
        cells = {(box["x"] + x, box["y"] + y) for x in range(box["w"]) for y in range(box["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
