"""Whatever ``toml.dumps`` writes, the standard library reads back unchanged."""

from __future__ import annotations

import dataclasses
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dprandp.config import schema, toml
from dprandp.errors import InputError

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


def test_what_toml_does_not_have() -> None:
    back = tomllib.loads(toml.dumps({"nan": math.nan, "stages": (1, 2), "probe": {"lr": 0.03, "absent": None}}))
    assert math.isnan(back["nan"])
    assert (back["stages"], back["probe"]) == ([1, 2], {"lr": 0.03})
    for bad in ({"a": object()}, {1: 2}, {"a": [None]}):
        with pytest.raises(TypeError):
            toml.dumps(bad)
    with pytest.raises(ValueError, match="surrogates"):
        toml.dumps({"a": "\ud800"})


# -------------------------------------------------------------------------------------------------------- hostile files


def dotted(lines: int, parts: int) -> str:
    return "".join(f"{'k.' * (parts - 1)}k{number} = 1\n" for number in range(lines))


HOSTILE = {
    "many dotted keys": (dotted(20_000, 100), r"has \d{7} bytes; a configuration may have at most 65536"),
    "one long key": ("[probe]\n" + "k." * 30_000 + "k = 1\n", "line 2 of .* 30000 dots; a line .* at most 200"),
    "a long header": ("[" + "k." * 30_000 + "k]\n", "line 1 of .* has 30000 dots"),
    "deep lists": ("a = " + "[" * 60_000, "nested too deeply"),
    "deep tables": ("a = " + "{a=" * 20_000, "nested too deeply"),
    "large": ("#" * 10_000_000, "has 10000000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """It says what is wrong, with which value, and the limit. The first took five minutes to parse."""
    text, words = HOSTILE[name]
    file = tmp_path / "a.toml"
    file.write_text(text)
    before = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        toml.read(file)
    assert time.process_time() - before < 2
    assert caught.value.fix
    assert "a.toml" in str(caught.value)


@pytest.mark.parametrize("parts", [2, 201])
def test_the_worst_file_within_the_limits_takes_no_time(tmp_path: Path, parts: int) -> None:
    lines = toml.MOST_BYTES // len(dotted(1, parts)) - 200 // parts
    file = tmp_path / "a.toml"
    file.write_text(dotted(lines, parts)[: toml.MOST_BYTES].rpartition("\n")[0])
    assert 0.8 * toml.MOST_BYTES < file.stat().st_size <= toml.MOST_BYTES
    before = time.process_time()
    toml.read(file)
    assert time.process_time() - before < 2


def test_a_configuration_of_every_setting_is_far_below_the_limits(tmp_path: Path) -> None:
    tables = {
        stage: {field.name: "some/path.of/some.file" for field in dataclasses.fields(kind)}
        for stage, kind in schema.STAGE_CONFIGS.items()
    }
    file = tmp_path / "all.toml"
    file.write_text(toml.dumps(tables))
    assert toml.read(file) == tables
    assert file.stat().st_size < toml.MOST_BYTES / 8
