# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimv2 import light_json

_TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda below: st.lists(below) | st.dictionaries(st.text(), below),
)


@given(_TREES)
def test_it_is_what_json_writes_and_reads(value: Any) -> None:
    assert json.loads(light_json.dumps(value)) == value
    assert light_json.loads(json.dumps(value, indent=1)) == value
    assert light_json.loads(f" {json.dumps(value, ensure_ascii=False)}\n".encode()) == value


_WRONG = ("", " ", "{", "[1", '{"a" 1}', "1 2", "[1,]", '"\x01"')


@pytest.mark.parametrize("text", [*_WRONG, b"\xff"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        light_json.loads(text)


@pytest.mark.parametrize("text", _WRONG)
def test_it_says_what_json_says_where_nobody_has_loaded_that(text: str) -> None:
    """Python 3.11's scanner looks for json's exception, and does not load it."""
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    script = "import sys; sys.path[:0] = sys.argv[2:]; from shimv2 import light_json"
    said = _run(
        f"{script}\ntry: light_json.loads(sys.argv[1])\nexcept ValueError as e: print(e)", text
    )
    assert said == f"{expected.value}\n"


def test_what_json_does_not_know_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="set in a JSON document"):
        light_json.dumps({"a": {1}})


def test_start_and_delete_load_nothing_slow() -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[2:];"
        "from shimv2 import cli, delete, state; from shimv2.ready import hand_over;"
        "print(*sys.modules)"
    )
    loaded = _run(script).split()
    slow = {"asyncio", "collections", "enum", "json", "pathlib", "re", "socket", "trio", "typing"}
    assert slow.isdisjoint(loaded), slow.intersection(loaded)


def _run(script: str, argument: str = "") -> str:
    words = [sys.executable, "-IS", "-c", script, argument, *[path for path in sys.path if path]]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
