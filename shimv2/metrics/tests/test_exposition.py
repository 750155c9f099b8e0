# SPDX-License-Identifier: Apache-2.0
"""The text format, judged by Prometheus' own parser."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from shimv2.metrics.durations import Durations
from shimv2.metrics.exposition import Page, parse
from shimv2.metrics.sandbox import guest_page


def judged(page: Page) -> dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]:
    """What Prometheus' parser reads: family → (name, labels) → value; nothing may come twice."""
    found: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in text_string_to_metric_families(str(page)):
        assert family.name not in found
        series = found[family.name] = {}
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in series
            series[key] = sample.value
    return found


def test_values_labels_and_escapes() -> None:
    page = Page()
    page.value("a", "Help.", 1)
    page.add("b", "", [({"x": 'q"\\\n', "y": ""}, 0.5), ({"x": "2"}, math.inf)])
    page.items("nothing", "Left out.", {})
    found = judged(page)
    assert found["a"] == {("a", ()): 1}
    assert found["b"][("b", (("x", 'q"\\\n'), ("y", "")))] == 0.5
    assert math.isinf(found["b"][("b", (("x", "2"),))])
    assert "nothing" not in found


def test_a_histogram() -> None:
    durations = Durations((1, 2, 4))
    for milliseconds in (0.5, 1, 3, 3.5, 100):
        durations.add(milliseconds / 1000, "start")
    page = Page()
    page.histogram("h", "Calls.", durations)
    series = judged(page)["h"]
    buckets = {dict(labels)["le"]: v for (name, labels), v in series.items() if name == "h_bucket"}
    assert buckets == {"1": 2, "2": 2, "4": 4, "+Inf": 5}
    assert series["h_count", (("action", "start"),)] == 5
    assert series["h_sum", (("action", "start"),)] == 108


def test_merged_pages_are_told_apart_by_labels() -> None:
    total = Page()
    for sandbox in ("one", "two"):
        page = Page()
        page.value("a", "Help.", 1)
        page.items("b", "Help.", {"x": 2})
        total.merge(page, {"sandbox_id": sandbox})
    found = judged(total)
    assert len(found["a"]) == len(found["b"]) == 2
    assert ("b", (("item", "x"), ("sandbox_id", "two"))) in found["b"]


def test_a_family_of_another_kind_is_left_out() -> None:
    ours, theirs = Page(), Page()
    ours.value("a", "", 1, "counter")
    theirs.value("a", "", 2, "gauge")
    ours.merge(theirs, {"sandbox_id": "x"})
    assert len(ours.families["a"].samples) == 1


def test_what_was_written_is_read_as_it_was() -> None:
    durations = Durations()
    durations.add(0.3, "create")
    page = Page()
    page.histogram("h", "Calls.", durations)
    page.add("a", "One.", [({"x": 'q"\\\n,{}'}, -1.5e300)], "counter")
    assert str(parse(str(page), samples=100)) == str(page)


@pytest.mark.parametrize(
    "line",
    [
        "kata_guest_x",
        "kata_guest_x  1",
        "kata_guest_x 1 1700000000000",
        "kata_guest_x one",
        "kata guest_x 1",
        'kata_guest_x{a="1" 1',
        "kata_guest_x{a=1} 1",
        'kata_guest_x{a="\\x"} 1',
        'kata_guest_x{a="1",a="2"} 1',
        'kata_guest_x{sandbox_id="other"} 1',
        "kata_guest_x 1\r",
        "kata_shim_threads 1",
        "kata_hypervisor_fds 1",
        "up 1",
        'kata_guest_x{a="' + "y" * 5000 + '"} 1',
    ],
)
def test_a_guest_gets_nothing_else_on_the_page(line: str) -> None:
    page = guest_page(f"{line}\nkata_guest_good 2\n")
    assert judged(page) == {"kata_guest_good": {("kata_guest_good", ()): 2}}


def test_a_guest_has_no_say_in_kinds_and_numbers() -> None:
    page = guest_page(
        "# TYPE kata_guest_a histogram\n# HELP kata_guest_a \\ \x00 # TYPE b gauge\n"
        + "kata_guest_a 1\nkata_guest_a 2\nkata_guest_a_bucket 3\nprocess_cpu_seconds_total 1\n"
        + "".join(f'kata_guest_b{{i="{i}"}} 1\n' for i in range(20_000))
    )
    found = judged(page)
    assert found["kata_guest_a"] == {("kata_guest_a", ()): 1}
    assert page.families["kata_guest_a"].kind == "gauge"
    assert page.families["kata_agent_process_cpu_seconds_total"].kind == "counter"
    assert sum(map(len, found.values())) == 10_000 - 1  # one was there already


@given(st.text(), st.integers(0, 5))
def test_any_text_of_a_guest_leaves_a_page_that_can_be_read(text: str, samples: int) -> None:
    page = parse("\n".join(["a 1", text, 'b{c="d"} 2']), samples=samples)
    assert len([s for f in page.families.values() for s in f.samples]) <= samples
    judged(page)


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.text()), st.floats())
def test_any_label_and_value_is_read_as_it_was(labels: dict[str, str], value: float) -> None:
    page = Page()
    page.add("x", "", [(labels, value)])
    ((_, read),) = [
        (s.labels, s.value) for f in text_string_to_metric_families(str(page)) for s in f.samples
    ]
    assert read == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True)
