"""What report and card say of several labels an image, of grades and declared shares; and what a result must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_run import GENERATED, PRETRAINED, make_run, private_result, written

from dprandp.report.card import model_card
from dprandp.report.disclosure import disclosure, figures, model_warnings
from dprandp.runs.directory import frozen
from dprandp.runs.results import PrivateResult, wrong_entry

LABELS = ("mass", "<b>edema")
EACH = {
    "recall": 0.5, "recall_interval": [0.4, 0.6], "precision": 0.75, "precision_interval": [0.7, 0.8], "auc": 0.8125,
    "auc_interval": [0.75, 0.875],
}  # fmt: skip
SILENT = EACH | {"recall": 0.0, "precision": None, "precision_interval": None, "auc": None, "auc_interval": None}


def several(**changes: Any) -> dict[str, Any]:
    return {
        "classes": LABELS, "multi_label": True, "confusion": None, "accuracy": 0.9, "majority_accuracy": 0.95,
        "auc": 0.7, "per_class": [EACH, EACH],
        "intervals": {"accuracy": [0.89, 0.91], "auc": [0.6, 0.8], "balanced_accuracy": [0.5, 0.9]},
    } | changes  # fmt: skip


def test_a_report_of_several_labels(tmp_path: Path) -> None:
    page = written(make_run(tmp_path / "run", **several(per_class=[EACH, SILENT])))
    assert "Confusion matrix" not in page
    assert "which of 2 labels an image has, it said rightly in 90" in page
    assert "&lt;b&gt;edema" in page
    assert "mean AUC 0.700, test accuracy 90" in page
    assert '<td data-column="AUC">0.812</td><td data-column="95 % interval">0.75 to 0.875</td>' in page
    card = model_card(private_result("probe", **several(per_class=[EACH, SILENT])), PRETRAINED, GENERATED)
    assert "Saying which of 2 labels an image like those of" in card
    assert "Labels, of which an image may have several: mass, &lt;b&gt;edema." in card
    assert "| label | recall | 95 % interval | precision | 95 % interval | AUC | 95 % interval |\n|---|---|---|" in card
    assert "| mass | 50 % | 40 to 60 % | 75 % | 70 to 80 % | 0.812 | 0.75 to 0.875 |" in card
    assert "| mean AUC over the labels | 0.7000 | 0.6 to 0.8 |" in card


@pytest.mark.parametrize(
    ("changes", "said"),
    [(several(), []),  # accuracy below that of the more frequent answers is usual for rare labels
     (several(intervals={"auc": [0.5, 0.8]}), ["not better than guessing: mean AUC 70"]),
     (several(per_class=[EACH, SILENT]), ["never predicts label <b>edema with a probability above .5"]),
     (several(auc=None, intervals={}), []),
     ({"class_shares": [0.1] * 10, "accuracy": 0.05, "intervals": {"balanced_accuracy": [0.2, 0.9]}}, []),
     ({"class_shares": [0.1] * 10, "intervals": {"balanced_accuracy": [0.1, 0.9]}},
      ["not better than guessing: balanced accuracy 85.7"])],
)  # fmt: skip
def test_warnings(changes: dict[str, Any], said: list[str]) -> None:
    found = [text.replace("\u00a0", " ") for text in model_warnings(private_result("probe", **changes))]
    assert len(found) == len(said)
    assert all(words in warning for words, warning in zip(said, found, strict=True))


def row(result: PrivateResult, label: str) -> str:
    return dict(disclosure(result))[label]


def test_the_disclosure_names_the_loss_and_what_was_declared() -> None:
    plain = "softmax cross-entropy of one class an image, all classes weighted alike"
    assert row(private_result("probe"), "Loss") == plain
    declared = private_result("probe", **several(class_shares=[0.25, 0.001]))
    assert "binary cross-entropies of 2 labels, clipped together as one gradient, weighted by the shares" in row(
        declared, "Loss"
    )
    assert "declared: mass 0.25, <b>edema 0.001. This program did not compute them" in row(declared, "Loss")
    assert "class shares" in row(declared, "Public inputs")
    assert "class shares" not in row(private_result("probe"), "Public inputs")


def test_the_kappa_of_grades() -> None:
    result = private_result("probe", kappa=-0.25, intervals={"kappa": [-0.5, 0.125]})
    assert ("kappa of the grades, quadratic weights", "-0.2500", "-0.5 to 0.125") in figures(result)
    assert not any("kappa" in label for label, *_ in figures(private_result("probe")))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [({}, None), ({"multi_label": None}, "confusion"), ({"confusion": [[1, 0], [0, 1]]}, "confusion"),
     ({"per_class": [EACH]}, "per_class"), ({"class_shares": [0.5]}, "class_shares"),
     ({"class_shares": [0.5, 2]}, "class_shares"), ({"kappa": 1.5}, "kappa"),
     ({"intervals": {"kappa": [-2, 0]}}, "intervals")],
)  # fmt: skip
def test_a_result_that_contradicts_itself(changes: dict[str, Any], wrong: str | None) -> None:
    whole = frozen(private_result("probe", **several()))
    assert wrong_entry("probe", whole | changes) == wrong
