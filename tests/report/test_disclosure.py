"""The disclosure, field by field, in the report and in the model card; and the numbers that explain it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from fake_run import EVIL, GENERATED, PRETRAINED, make_run, private_result, written
from html_page import Page

from dprandp.errors import CheckpointError
from dprandp.pipeline import as_json, stage_line
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.gaussian_dp import gaussian_dp_mu
from dprandp.privacy.neighbours import trade_off
from dprandp.report import disclosure as disclosing
from dprandp.report.card import model_card
from dprandp.report.disclosure import disclosure
from dprandp.runs.directory import frozen
from dprandp.runs.results import read_result, wrong_entry
from dprandp.vision.intervals import wilson

# -------------------------------------------------------------------------------------------------------- disclosure


FIELDS = {
    "mechanism": (r"^Mechanism$", r"Poisson-subsampled Gaussian mechanism"),
    "epsilon": (r"^ε ", r"0\.999\b.*upper bound.*stage 1, of the run 1\b"),
    "delta": (r"^δ$", r"^1e-5, which is 0\.014/N$"),
    "adjacency": (r"^Adjacency$", r"zero-out of one record.*N, q, the divisor and all other positions stay the same"),
    "unit": (r"^Unit of privacy$", r"one image"),
    "groups": (r"^Several records together$", r"2: ε = .*10: ε = .*--group-size"),
    "N": (r"^N ", r"1437\b.*public"),
    "q": (r"^q ", r"0\.0207\b.*qN = 29\.7459"),
    "T": (r"^T ", r"\b20 planned, 22 charged.*\b2 of these were lost"),
    "sigma": (r"^σ ", r"2\.345\b"),
    "C": (r"^C ", r"1\.25\b"),
    "K": (r"^K ", r"^4\b"),
    "accountant and version": (r"^Accountant$", r"PLD \(dp-accounting 0\.6\.0\)"),
    "RNG mode": (r"^Random numbers$", r"^os-entropy"),
    "tuning, and its data": (r"^Tuning", r"public benchmark.*Not default: lr = 3"),
    "public": (r"^Public inputs$", r"4000 synthetic images.*stylegan-oriented.*patchnet.*Handwritten digits"),
    "released": (r"^Released$", r"EMA, decay 0\.9999.*test metrics"),
    "floating point": (r"^Limit: floating-point noise \(severity low\)$", r"Mironov.*float64"),
    "tails and timing": (r"^Limit: tails", r"12\.2 standard deviations.*constant time"),
    "N public": (r"^Limit: N", r"public|not cover"),
    "test split": (
        r"^Limit: test split$",
        r"Each private stage .*evaluates .*once, at its end; nothing is chosen .*without noise",
    ),
    "other copies": (r"^Limit: other", r"add to it.*same person"),
}
"""Every field that must be disclosed beside an ε: how it is labelled, and what its value says for the run above."""


def undisclosed(rows: list[tuple[str, str]]) -> list[str]:
    """The fields that a disclosure lacks."""
    return [
        field
        for field, (label, value) in FIELDS.items()
        if not any(re.search(label, name) and re.search(value, said) for name, said in rows)
    ]


def test_disclosure_is_complete_field_by_field() -> None:
    rows = disclosure(private_result("finetune"), PRETRAINED, GENERATED, changed=["lr = 3 (default automatic)"])
    assert undisclosed(rows) == []
    # the positive control: without a row, exactly its field is missed
    lost = [undisclosed(rows[:index] + rows[index + 1 :]) for index in range(len(rows))]
    assert sorted(field for fields in lost for field in fields) == sorted(FIELDS)


FOLLOWS: list[tuple[str, Any, str]] = [
    ("epsilon", 0.7, "ε (privacy loss)"), ("epsilon", 0.7, "Several records together"),
    ("epsilon_target", 0.7, "ε (privacy loss)"), ("delta", 1e-6, "δ"), ("adjacency", "replace one record", "Adjacency"),
    ("unit", "one patient (column p)", "Unit of privacy"), ("unit", "one patient (column p)", "N (training examples)"),
    ("unit", "one patient (column p)", "Mechanism"), ("unit", "one patient (column p)", "Limit: other copies"),
    ("noise", "discrete", "Mechanism"), ("noise", "discrete", "Limit: floating-point noise (severity low)"),
    ("noise", "discrete", "Limit: tails and timing"), ("train_examples", 999, "N (training examples)"),
    ("sample_rate", 0.5, "q (sampling rate)"), ("sample_rate", 1.0, "Mechanism"),
    ("expected_batch", 33, "q (sampling rate)"), ("steps", 21, "T (noisy steps)"),
    ("charged_steps", 33, "T (noisy steps)"), ("lost_steps", 0, "T (noisy steps)"),
    ("noise_multiplier", 3.5, "σ (noise multiplier)"), ("noise_multiplier", 0.0, "Mechanism"),
    ("clip_norm", 2.5, "C (clip norm)"), ("views", 16, "K (views per example)"),
    ("accountant", "RDP (opacus 1.5)", "Accountant"), ("random", "insecure-seed", "Random numbers"),
    ("released", "last", "Released"), ("source", "scratch", "Public inputs"),
]  # fmt: skip


def test_disclosure_follows_the_result() -> None:
    before = dict(disclosure(private_result("finetune"), PRETRAINED, GENERATED))
    for key, value, label in FOLLOWS:
        after = dict(disclosure(private_result("finetune", **{key: value}), PRETRAINED, GENERATED))
        assert before.keys() == after.keys()
        assert before[label] != after[label], (key, label)


def test_delta_is_held_against_one_over_n() -> None:
    for delta, share in ((1e-5, "0.5/N"), (2e-6, "0.1/N")):
        facts = {"delta": delta, "train_examples": 50_000, "train_units": 50_000}
        said = dict(disclosure(private_result("finetune", **facts)))["δ"]
        assert f"which is {share}" in said
        assert ("at most 0.1/N is advised" in said) == (share == "0.5/N")


def test_report_and_card_show_the_whole_disclosure(tmp_path: Path) -> None:
    text = Page(written(make_run(tmp_path / "x"))).text
    plain = model_card(private_result("finetune"), PRETRAINED, GENERATED).replace("\\", "")
    for stage in ("probe", "finetune"):
        for label, value in disclosure(private_result(stage), PRETRAINED, GENERATED):
            assert label in text
            assert value in text, label
            assert stage == "probe" or f"| {label} | {value} |" in plain
    assert "Also counted in ε | probe: q = 1, T = 123, σ = 133.7, C = 1.25 |" in plain


def test_incomplete_result_is_refused() -> None:
    whole = frozen(private_result("finetune"))
    for key in whole:
        with pytest.raises(CheckpointError, match=rf"lacks .*\b{key}\b"):
            read_result("finetune", {name: value for name, value in whole.items() if name != key})


# ---------------------------------------------------------------------------------------------------- the model card


def test_model_card() -> None:
    card = model_card(private_result("probe"), PRETRAINED, GENERATED)
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == [
        "Privacy", "Intended use", "Out-of-scope use", "Data", "How it was trained", "Metrics on the 360 test images",
        "Disclosure",
    ]  # fmt: skip
    for content in (
        "(ε = 0.3, δ = 1e-5)-differential privacy", "Licence of the data: not known", "86.1 %",
        "learned from 4000 images of the random process stylegan-oriented", "A linear head was trained",
    ):  # fmt: skip
        assert content in card, content
    assert "NOT PRIVATE" not in card
    card = model_card(private_result("finetune", source="scratch"), {}, {})
    assert "started from random weights" in card
    assert "synthetic images" not in card.replace("constants or synthetic images", "")
    assert "All parameters were trained" in card


def test_model_card_escapes_and_shortens() -> None:
    classes = [EVIL, "a|b", "*c*\nd", *map(str, range(60))]
    card = model_card(private_result("probe", classes=classes, title="T|<b>"), PRETRAINED, GENERATED)
    assert "<script" not in card
    assert "<b>" not in card
    assert "a\\|b" in card
    assert "and 13 more" in card
    for line in card.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)  # of the figures, with their intervals


# ----------------------------------------------------------------------------------------------------------- numbers


def gaussian_rate(mu: float) -> float:
    """The best test between N(0,1) and N(μ,1) at 1 % false positives: a threshold."""
    return 1 - NormalDist(mu).cdf(NormalDist().inv_cdf(0.99))


def test_the_detection_rate_of_full_batches_is_that_of_the_best_test() -> None:
    for epsilon, mu in ((1.0, 0.268), (8.0, 1.666)):  # at δ = 1e-5
        found = disclosing.detected_at_most(private_result("probe"), epsilon)
        assert found == pytest.approx(gaussian_rate(mu), rel=5e-3)
    assert disclosing.detected_at_most(private_result("probe"), 1e-4) == pytest.approx(0.01, abs=1e-4)
    assert "at most 1.3\u00a0% of" in disclosing.privacy_sentence(private_result("probe"))


@pytest.mark.parametrize(("rate", "sigma", "epsilon"), [(0.036, 0.5, 0.1), (0.5, 2.0, 1.0)])
def test_the_detection_rate_of_one_sampled_stage_is_that_of_the_best_test(
    rate: float, sigma: float, epsilon: float
) -> None:
    """Of one step, the best test is a threshold on x: N(0, σ²) against (1 − q) N(0, σ²) + q N(1, σ²)."""
    result = private_result("finetune", also_charged=[], steps=1, charged_steps=1, lost_steps=0, sample_rate=rate,
                            noise_multiplier=sigma, epsilon=epsilon, delta=0.036)  # fmt: skip
    without, record = NormalDist(0, sigma), NormalDist(1, sigma)
    high, low = without.inv_cdf(0.99), without.inv_cdf(0.01)
    up = (1 - rate) * 0.01 + rate * (1 - record.cdf(high))
    # without the record seen as the mixture: false positives of {x < t} are the mixture's, true ones N(0, σ²)'s
    mixed = np.linspace(low - 1, low + 1, 100_001)
    below = np.array([(1 - rate) * without.cdf(x) + rate * record.cdf(x) for x in mixed[::50]])
    down = without.cdf(float(np.interp(0.01, below, mixed[::50])))
    found = disclosing.detected_at_most(result, epsilon)
    assert max(up, down) - 1e-6 <= found <= 1.01 * max(up, down) + 0.05 * 0.036
    # more was spent since than the stage alone
    more = disclosing.detected_at_most(result, 2 * epsilon)
    assert more >= gaussian_rate(gaussian_dp_mu(2 * epsilon, 0.036))


def test_the_gaussian_through_epsilon_and_delta_is_no_bound_for_one_sampled_stage() -> None:
    """The figure that was printed before: too low where δ is near 1/N."""
    event = GaussianEvent(0.5, 0.036, 1)
    epsilon = compose([event], 0.036).upper
    result = private_result("finetune", also_charged=[], steps=1, charged_steps=1, lost_steps=0, sample_rate=0.036,
                            noise_multiplier=0.5, epsilon=epsilon, delta=0.036)  # fmt: skip
    assert disclosing.detected_at_most(result, epsilon) > 1.3 * gaussian_rate(gaussian_dp_mu(epsilon, 0.036))


def test_the_detection_rate_of_several_stages_bounds_that_of_their_composition() -> None:
    delta = 0.036
    stages = [[GaussianEvent(30.0, 1.0, 100)], [GaussianEvent(1.0, 0.036, 30)]]
    epsilon = compose_stages(stages, delta).upper
    result = private_result("finetune", steps=30, charged_steps=30, lost_steps=0, sample_rate=0.036,
                            noise_multiplier=1.0, epsilon=epsilon, delta=delta)  # fmt: skip
    together = trade_off([event for stage in stages for event in stage]).true_positive_rate(0.01)
    assert together <= disclosing.detected_at_most(result, epsilon) <= 1.5 * together


def test_the_detection_rate_after_private_tuning_follows_from_epsilon_and_delta_alone() -> None:
    tuned = {"on": "private", "trials": 4, "charged_epsilon": 0.2, "settings": ("steps",), "used": True}
    result = private_result("probe", tuned=tuned)
    assert disclosing.detected_at_most(result, 1.0) == pytest.approx(0.01 * math.e + 1e-5)
    assert disclosing.detected_at_most(result, 8.0) == pytest.approx(1 - math.exp(-8) * (0.99 - 1e-5))


def test_printed_epsilon_is_never_below_the_truth() -> None:
    for epsilon in [0.0, 1e-9, 0.3, 0.29901, 0.9999, 1.0, 1.0000004, 7.9996, 3.1415926]:
        shown = float(disclosing.epsilon_text(epsilon))
        assert epsilon - 1e-12 <= shown + 1e-12
        assert shown - epsilon <= 1e-3
    assert disclosing.epsilon_text(math.inf) == "∞"
    assert disclosing.epsilon_text(0.3) == "0.3"


def test_wilson_interval_against_its_definition() -> None:
    """The shares p whose normal approximation does not reject what was seen, found by trying them."""
    tried = np.linspace(0, 1, 200_001)
    for share, count in ((0.8917, 360), (0.0, 20), (1.0, 20), (0.5, 10_000)):
        accepted = tried[(share - tried) ** 2 <= 1.96**2 * tried * (1 - tried) / count + 1e-15]
        assert wilson(share, count) == pytest.approx((accepted.min(), accepted.max()), abs=2e-5)


# ----------------------------------------------------------------------------------------- figures with their intervals


def figures_of_two(**changes: Any) -> dict[str, Any]:
    """Of a result with two classes: 130 of 160 images are right."""
    return {
        "classes": ["healthy", "sick"], "confusion": [[90, 10], [20, 40]], "accuracy": 0.8125, "auc": 0.8765,
        "majority_accuracy": 0.625, "test_examples": 160, "sensitivity": 0.6667, "specificity": 0.9,
        "intervals": {"accuracy": [0.7449, 0.8654], "auc": [0.8181, 0.9292], "sensitivity": [0.5406, 0.7727],
                      "specificity": [0.8256, 0.9448], "majority_accuracy": [0.5479, 0.6961]},
        "interval_method": "95 %: by test",
        "per_class": [
            {"recall": 0.9, "recall_interval": [0.8256, 0.9448], "precision": 0.8182,
             "precision_interval": [0.7, 0.9]},
            {"recall": None, "recall_interval": None, "precision": None, "precision_interval": None},
        ],
    } | changes  # fmt: skip


def test_card_report_and_line_show_each_figure_with_its_interval(tmp_path: Path) -> None:
    result = private_result("finetune", **figures_of_two())
    card = model_card(result, PRETRAINED, GENERATED).replace("\\", "")
    for row in (
        "| accuracy | 81.2 % | 74.4 to 86.6 % |", "| AUC | 0.8765 | 0.818 to 0.93 |",  # rounded outwards
        "| accuracy of always predicting the most frequent class | 62.5 % | 54.7 to 69.7 % |",
        "| sensitivity (recall of sick) | 66.7 % | 54 to 77.3 % |", "| specificity (recall of healthy) | 90 % |",
        "| healthy | 90 % | 82.5 to 94.5 % | 81.8 % | 70 to 90 % |",
        "| sick | no test image | – | never predicted | – |",
        "Intervals: 95 %: by test.", "| balanced accuracy (mean recall) | 85.7 % | – |",
    ):  # fmt: skip
        assert row in card, row
    text = Page(written(make_run(tmp_path / "run", **figures_of_two()))).text
    for said in (
        "74.4 to 86.6 % (95 % interval), 160 images", "sensitivity (recall of sick)", "54 to 77.3 %", "95 %: by test",
    ):  # fmt: skip
        assert said in text, said
    said = stage_line("finetune", result)
    assert "accuracy 81.25 % (95 %: 74.4 to 86.6; most frequent class 62.5 %; AUC 0.876) at ε = 0.999" in said


def test_an_older_result_has_an_interval_of_its_accuracy_alone() -> None:
    result = private_result("finetune")
    assert (result.intervals, result.interval("auc")) == (None, None)
    assert result.interval("accuracy") == wilson(result.accuracy, 360)
    assert "| accuracy | 89.2 % | 85.5 to 92 % |" in model_card(result, PRETRAINED, GENERATED)
    assert "(95 %: 85.5 to 92; most frequent class 10.3 %)" in stage_line("finetune", result)


def test_damaged_intervals_are_refused() -> None:
    whole = frozen(private_result("finetune", **figures_of_two()))
    assert wrong_entry("finetune", whole) is None
    for key, value in (
        ("intervals", {"accuracy": [0.1]}), ("intervals", {"accuracy": [0.9, 0.1]}), ("intervals", [0.1, 0.9]),
        ("per_class", whole["per_class"][:1]), ("per_class", [{"recall": 2}] * 2), ("interval_method", 3),
    ):  # fmt: skip
        assert wrong_entry("finetune", whole | {key: value}) == key


# ------------------------------------------------------------------------------------------------ a model worth nothing


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, []),
     ({"accuracy": 0.7, "intervals": {"accuracy": [0.6249, 0.76]}}, ["not better than always saying"]),
     ({"accuracy": 0.7, "intervals": {"accuracy": [0.6251, 0.76]}}, []),
     ({"accuracy": 0.63, "intervals": None}, ["not better than always saying"]),
     ({"confusion": [[100, 0], [60, 0]]}, ["never predicts class sick"]),
     ({"confusion": [[160, 0], [0, 0]]}, []),  # nobody knows: no test image is sick
     ({"accuracy": 0.625, "intervals": {"accuracy": [0.548, 0.697]}, "confusion": [[0, 100], [0, 60]]},
      ["not better than always saying", "never predicts class healthy"])],
)  # fmt: skip
def test_warnings_about_a_model(changes: dict[str, Any], said: list[str]) -> None:
    result = private_result("probe", **figures_of_two(**changes))
    found = disclosing.model_warnings(result)
    assert len(found) == len(said)
    assert all(words in warning for words, warning in zip(said, found, strict=True))
    line, card = stage_line("probe", result), model_card(result, PRETRAINED, GENERATED)
    assert line.count("; WARNING: the model ") == card.count("> [!WARNING]\n> Warning: the model ") == len(said)
    assert as_json("probe", result)["warnings"] == found


def test_a_report_has_its_warnings_at_the_top(tmp_path: Path) -> None:
    matrix = [[36 if predicted == 4 else 0 for predicted in range(10)] for _ in range(10)]
    bad = {"accuracy": 0.1, "confusion": matrix, "classes": [f"<b>{name}" for name in range(10)]}
    content = written(make_run(tmp_path / "run", **bad))
    found = re.findall(r'<p class="warning" role="alert">(.*?)</p>', content)
    assert len(found) == 2
    assert "the classes &lt;b&gt;0, &lt;b&gt;1, &lt;b&gt;2, &lt;b&gt;3, &lt;b&gt;5 and 4 more" in found[1]
    assert content.index('class="warning"') < content.index("Test accuracy")
    assert 'class="warning"' not in written(make_run(tmp_path / "good"))
