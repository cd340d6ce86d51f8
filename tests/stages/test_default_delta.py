"""δ where none was asked for: what is advised, or what published results for the data set are stated at."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run_probe

from dprandp.data import KNOWN
from dprandp.dpsgd.budget import default_delta, read_plan_file
from dprandp.privacy.accounting import advised_delta
from dprandp.privacy.mechanism import validate_budget
from dprandp.runs.directory import RunDir

PUBLISHED = {"cifar10", "cifar100", "mnist", "fashion-mnist"}


@given(examples=st.integers(1, 10**12))
def test_the_advice_is_one_digit_and_at_most_a_tenth_of_1_over_n(examples: int) -> None:
    advised = advised_delta(examples)
    assert float(f"{advised:.0e}") == advised
    assert advised <= min(1e-5, 0.1 / examples) < 2 * advised  # rounded down, by less than a digit
    assert default_delta(examples) == advised
    published = default_delta(examples, 1e-5)  # the default only where it means something
    assert published == (1e-5 if examples < 100_000 else advised)


def test_the_default_of_every_known_data_set() -> None:
    for name, known in KNOWN.items():
        spec = known.spec()
        delta = default_delta(spec.train_units, spec.published_delta)
        validate_budget(1.0, delta, spec.train_units)
        assert (spec.published_delta is not None) == (name in PUBLISHED)
        assert delta == 1e-5 if name in PUBLISHED else delta <= 0.1 / spec.train_units


def test_a_run_keeps_its_delta_where_none_is_asked_for(copy, public_run, data) -> None:
    """Of the same data under another name the default may differ, and may differ in another version."""
    run = copy(public_run)
    run_probe(run, data, delta=3e-6)
    assert run_probe(run, data, {"overwrite": True}, share=0.2)["delta"] == 3e-6
    document = read_plan_file(RunDir.open(run, create=False))
    assert document is not None
    assert document.budget.delta == 3e-6
