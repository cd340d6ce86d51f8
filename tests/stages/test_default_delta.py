"""δ where none was asked for: what is advised, or what published results for the data set are stated at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run_probe

from dprandp.data import KNOWN
from dprandp.dpsgd.budget import default_delta, read_plan_file
from dprandp.errors import UsageError
from dprandp.privacy.accounting import advised_delta
from dprandp.privacy.mechanism import validate_budget
from dprandp.runs.directory import RunDir

PUBLISHED = {"cifar10", "cifar100", "mnist", "fashion-mnist"}


@given(examples=st.integers(1, 10**12))
def test_the_advice_is_one_digit_and_at_most_a_tenth_of_1_over_n(examples: int) -> None:
    advised = advised_delta(examples)
    assert float(f"{advised:.0e}") == advised
    assert advised <= min(1e-5, 0.1 / examples) < 2 * advised  # rounded down, by less than a digit


@pytest.mark.parametrize(
    ("examples", "expected"),
    [(1, 1e-5), (9_999, 1e-5), (10_000, 1e-5), (10_001, 9e-6), (50_000, 2e-6), (60_000, 1e-6), (100_000, 1e-6),
     (100_001, 9e-7), (165_466, 6e-7)],
)  # fmt: skip
def test_the_boundaries_of_the_default(examples: int, expected: float) -> None:
    assert default_delta(examples) == advised_delta(examples) == expected


def test_a_published_delta_is_the_default_only_where_it_means_something() -> None:
    assert default_delta(50_000, 1e-5) == 1e-5
    assert default_delta(99_999, 1e-5) == 1e-5
    assert default_delta(100_000, 1e-5) == 1e-6  # at 1/N it would promise nothing to somebody
    assert default_delta(200_000, 1e-5) == 5e-7


def test_the_default_of_every_known_data_set() -> None:
    for name, known in KNOWN.items():
        spec = known.spec()
        delta = default_delta(spec.train_units, spec.published_delta)
        validate_budget(1.0, delta, spec.train_units)
        assert (spec.published_delta is not None) == (name in PUBLISHED)
        assert delta == 1e-5 if name in PUBLISHED else delta <= 0.1 / spec.train_units


def test_the_advice_in_a_refusal_is_the_default() -> None:
    for examples in (1_440, 21_600, 10**6):
        with pytest.raises(UsageError) as caught:
            validate_budget(1.0, 1 / examples, examples)
        assert f"for instance {default_delta(examples):g}." in caught.value.fix


def test_a_run_keeps_its_delta_where_none_is_asked_for(
    copy: Callable[[Path], Path], public_run: Path, data: str
) -> None:
    """Of the same data under another name the default may differ, and may differ in another version."""
    run = copy(public_run)
    run_probe(run, data, delta=3e-6)
    assert run_probe(run, data, {"overwrite": True}, share=0.2)["delta"] == 3e-6
    document = read_plan_file(RunDir.open(run, create=False))
    assert document is not None
    assert document["delta"] == 3e-6
