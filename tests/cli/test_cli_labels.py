"""Several labels an image, grades, declared shares and labels that are text, through real commands."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, RunAfter, arrays, good, refused
from medmnist.evaluator import getACC, getAUC
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

LABELS = ("bright", "left", "striped")
TASK = "multi-label, binary-class"


def several(train: int = 160, test: int = 60, side: int = 12) -> dict[str, np.ndarray]:
    """Noise of which three properties are labels, each with its own chance."""
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {"classes": np.array(LABELS)}
    for split, count in (("train", train), ("test", test)):
        labels = (random.random((count, 3)) < (0.5, 0.4, 0.3)).astype(np.uint8)
        images = random.integers(0, 60, (count, side, side))
        images += 60 * labels[:, 0, None, None]
        images[:, :, : side // 2] += 60 * labels[:, 1, None, None]
        images[:, ::2] += 60 * labels[:, 2, None, None]
        made |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    return made


@pytest.mark.slow
def test_several_labels_from_probe_to_an_outsiders_check(
    dprandp: Dprandp, run_after: RunAfter, tmp_path: Path
) -> None:
    """The oracle: medmnist's own evaluator, on what `predict` says."""
    data, run = several(), run_after("pretrain")
    np.savez(tmp_path / "several.npz", **data)
    command = ("--run", run, "--config", "labels.toml", "--json")
    (tmp_path / "labels.toml").write_text(SETTINGS)
    plan = dprandp("probe", *command[:-1], "--data", "npz:several.npz", "--eps", 20, "--plan", folder=tmp_path)
    assert "3 labels an image" in plan.out
    probed = good(dprandp("probe", *command, "--data", "npz:several.npz", "--eps", 20, folder=tmp_path))
    assert (probed["multi_label"], probed["classes"], probed["confusion"]) == (True, list(LABELS), None)
    tuned = good(dprandp("finetune", *command, folder=tmp_path))
    assert tuned["multi_label"]
    for made in (probed, tuned):
        assert 0.5 < made["auc"] <= 1
        assert set(made["intervals"]) == {"accuracy", "majority_accuracy", "balanced_accuracy", "auc"}
        for each in made["per_class"]:
            low, high = each["auc_interval"]
            assert low <= each["auc"] <= high + 1e-9

    # ---------------------------------------------------------------------------------------------- predict
    alone = ("predict", "--model", run / "model", "--data", "npz:several.npz")
    rows = good(dprandp(*alone, "--json", folder=tmp_path))["predictions"]
    table = np.array([[row["probabilities"][name] for name in LABELS] for row in rows])
    assert tuned["accuracy"] == pytest.approx(getACC(data["y_test"], table, TASK))
    assert tuned["auc"] == pytest.approx(getAUC(data["y_test"], table, TASK), abs=1e-6)
    for row in rows:
        assert row["labels"] == [name for name, value in row["probabilities"].items() if value > 0.5]
    assert not any("class" in row for row in rows)
    assert table.sum(axis=1).max() > 1.01
    assert dprandp(*alone, "--out", "answers.csv", folder=tmp_path).code == 0
    with open(tmp_path / "answers.csv", newline="") as file:
        head, *written = csv.reader(file)
    assert head == ["image", "labels", *LABELS, "error"]
    assert [row[1] for row in written] == ["|".join(row["labels"]) for row in rows]
    lines = dprandp(*alone, folder=tmp_path).out.splitlines()
    for line, row in zip(lines, rows, strict=True):
        shown = [f"{name} {row['probabilities'][name]:.4f}" for name in row["labels"]]
        assert line.endswith(", ".join(shown)) if shown else "none above 0.5" in line

    # ------------------------------------------------------------------------ report, card, export, verify, audit
    assert dprandp("report", "--run", run, folder=tmp_path).code == 0
    page, card = (run / "report.html").read_text(), (run / "model/MODEL_CARD.md").read_text()
    assert "Confusion matrix" not in page
    for text in (page, card):
        assert "sum of the binary cross-entropies of 3 labels" in text
        assert "mean AUC over the labels" in text
    assert "which of 3 labels an image like those" in card
    assert dprandp("export", "--run", run, "--out", "exported", folder=tmp_path).code == 0
    example = subprocess.run(
        [sys.executable, "example.py", tmp_path / "none.png"], cwd=tmp_path / "exported", capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "none.png" in example.stderr
    assert '*row["labels"]' in (tmp_path / "exported/example.py").read_text()
    exported = dprandp("export", "--run", run, "--format", "torch-export", "--out", "graph.pt2", folder=tmp_path)
    assert exported.code == 0, exported.err  # the graph was compared with the model
    assert dprandp("verify", "--run", run, folder=tmp_path).code == 0
    audited = dprandp("audit", "--run", run, "--trials", 200, "--no-controls", "--with-data", "--json", folder=tmp_path)
    assert audited.code in (0, 1)
    assert not any(found["replay"]["flagged"] for found in audited.json["mechanisms"])
    assert dprandp("compare", run, folder=tmp_path).code == 0
    assert json.loads((run / "model/config.json").read_text())["result"]["multi_label"] is True


SETTINGS = """
[probe]
dims = 32
statistics_images = 100
statistics_views = 2
steps = 60

[finetune]
steps = 3
refit_steps = 40
"""


def test_what_knows_one_class_an_image_is_refused(
    dprandp: Dprandp, run_after: RunAfter, vit: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "several.npz", **several())
    run, data = run_after("pretrain"), ("--data", "npz:several.npz")
    for command in (("tune", "--run", run), ("tune", "--run", run, "--on", "private"), ("continue", "--run", vit)):
        refused(dprandp(*command, *data, "--eps", 1, folder=tmp_path), 2, "several labels per image")
    refused(dprandp("probe", "--run", run, *data, "--ordinal", folder=tmp_path), 2, "--ordinal is for one class")


@pytest.mark.slow
def test_grades_and_declared_shares(dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path) -> None:
    """The oracle of kappa: scikit-learn, on what `predict` says."""
    run, data, names = run_after("pretrain"), arrays(), ["dark", "grey", "bright"]
    options = ("--data", "npz:tiny.npz", "--ordinal", "--class-shares", "0.2,0.2,0.6", "--eps", 20)
    probed = good(dprandp("probe", "--run", run, "--config", "small.toml", *options, "--json"))
    assert probed["class_shares"] == [0.2, 0.2, 0.6]
    rows = good(dprandp("predict", "--run", run, "--data", "npz:tiny.npz", "--json"))["predictions"]
    found = [names.index(row["class"]) for row in rows]
    assert probed["kappa"] == pytest.approx(cohen_kappa_score(data["y_test"], found, weights="quadratic"))
    low, high = probed["intervals"]["kappa"]
    assert low <= probed["kappa"] <= high
    assert probed["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(data["y_test"], found))
    card = (run / "model/MODEL_CARD.md").read_text()
    assert "weighted by the shares of the classes that the user declared: dark 0.2, grey 0.2, bright 0.6" in card
    assert "kappa of the grades, quadratic weights" in card
    tuned = good(dprandp("finetune", "--run", run, "--config", "small.toml", "--json"))  # keeps both declarations
    assert (tuned["class_shares"], "kappa" in tuned["intervals"]) == ([0.2, 0.2, 0.6], True)
    assert dprandp("report", "--run", run).code == 0
    page = (run / "report.html").read_text()
    assert "--class-shares 0.2,0.2,0.6" in page
    assert "Weighted kappa" in page


@pytest.mark.parametrize(
    ("shares", "says"),
    [("0.5,0.5", "names 2 shares for 3 classes"), ("0.5,0.5,0.5", "add up to 1.5"), ("a,b,c", "not numbers"),
     ("0,0.5,0.5", "not numbers between 0 and 1")],
)  # fmt: skip
def test_shares_that_are_none(dprandp: Dprandp, run_after: RunAfter, shares: str, says: str) -> None:
    run = run_after("pretrain")
    refused(dprandp("probe", "--run", run, "--data", "npz:tiny.npz", "--class-shares", shares), 2, says)
    refused(dprandp("tune", "--run", run, "--data", "npz:tiny.npz", "--class-shares", "0.2,0.2,0.6"), 2, "shares")
