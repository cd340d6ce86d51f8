"""Whatever ``toml.dumps`` writes, the standard library reads back unchanged."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dprandp import toml

text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.one_of(text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
values = st.one_of(scalars, st.none(), st.lists(st.one_of(scalars, st.lists(scalars, max_size=2)), max_size=4))
flat = st.dictionaries(text, values, max_size=6)
documents = st.dictionaries(text, st.one_of(values, flat), max_size=6)


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {k: without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def typed(value: Any) -> Any:
    """== takes 1, 1.0 and True for the same, and -0.0 for 0.0; a configuration must keep them apart."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return repr(value)


@given(documents)
def test_round_trip(document: dict[str, Any]) -> None:
    back = tomllib.loads(toml.dumps(document))
    assert typed(back) == typed(without_none(document))


def test_infinity_nan_tuples_and_awkward_strings() -> None:
    back = tomllib.loads(
        toml.dumps({"epsilon": math.inf, "low": -math.inf, "nan": math.nan, "stages": (1, 2), "path": 'a\\b"\x7f\n[x]'})
    )
    assert back["epsilon"] == math.inf
    assert back["low"] == -math.inf
    assert math.isnan(back["nan"])
    assert back["stages"] == [1, 2]
    assert back["path"] == 'a\\b"\x7f\n[x]'


def test_readable() -> None:
    assert toml.dumps({"pretrain": {"lr": 0.03}, "size": "tiny", "absent": None}) == (
        'size = "tiny"\n\n[pretrain]\nlr = 0.03\n'
    )


@pytest.mark.parametrize("bad", [{"a": object()}, {1: 2}, {"a": [None]}, {"a": {"b": {"c": 1}}}, {"a": [{"b": 1}]}])
def test_refuses_what_it_cannot_write(bad: dict[Any, Any]) -> None:
    with pytest.raises(TypeError):
        toml.dumps(bad)


def test_refuses_a_lone_surrogate() -> None:
    with pytest.raises(ValueError, match="Unicode"):
        toml.dumps({"a": "\ud800"})
