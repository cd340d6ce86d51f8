"""The figures that a stage reports about its model: from the one reading of the test split, with units where it has
them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_run import TEST, TRAIN, Copy, Record, blobs, forbid_reading, read_json, run_probe

from dprandp.errors import InputError
from dprandp.vision.intervals import wilson


def test_every_figure_is_recorded_with_its_interval_from_one_reading(
    copy: Copy, record: Record, public_run: Path, data: str
) -> None:
    run = copy(public_run)
    seen = record(run)
    result = run_probe(run, data)
    assert len(seen.tests) == 1
    stored = read_json(run / "run.json")["stages"]["probe"]["result"]
    assert stored == read_json(run / "model/config.json")["result"] | {"data": stored["data"]}
    assert set(result["intervals"]) == {"accuracy", "majority_accuracy", "balanced_accuracy", "auc"}
    assert result["intervals"]["accuracy"] == pytest.approx(wilson(result["accuracy"], TEST))
    assert result["majority_accuracy"] == max(np.bincount(blobs()["y_test"])) / TEST
    for name, confusion in zip(result["classes"], np.array(result["confusion"]), strict=True):
        place = result["classes"].index(name)
        assert result["per_class"][place]["recall"] == pytest.approx(confusion[place] / confusion.sum())
    assert "sensitivity" not in result  # of two classes alone


@pytest.fixture
def scans(tmp_path: Path) -> Callable[..., str]:
    def save(**more: np.ndarray) -> str:
        np.savez(tmp_path / "scans.npz", **blobs(), patient_train=np.arange(TRAIN) // 4, **more)
        return f"npz:{tmp_path / 'scans.npz'}"

    return save


def test_units_of_the_test_split_make_its_intervals(copy: Copy, public_run: Path, scans: Callable[..., str]) -> None:
    apart = run_probe(copy(public_run), scans(), unit_column="patient")
    assert "the test split names no units" in apart["interval_method"]
    patients = 1000 + np.arange(TEST) // 4
    together = run_probe(copy(public_run), scans(patient_test=patients), unit_column="patient")
    said = f"95 %: bootstrap over the {TEST // 4} units of the {TEST} test images"
    assert together["interval_method"].startswith(said)


# ------------------------------------------------------------------------------------------------- units in both splits


def test_units_in_both_splits_are_refused_before_a_pixel_is_read(
    copy: Copy, public_run: Path, scans: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = scans(patient_test=29 + np.arange(TEST) // 4)  # the last patient of the training split is in both
    run = copy(public_run)
    forbid_reading(monkeypatch)
    with pytest.raises(InputError, match=r"one patient .* in both the training and the test split") as caught:
        run_probe(run, shared, unit_column="patient")
    assert "--allow-shared-units" in caught.value.fix
    assert caught.value.private_detail == "1 units"  # the number is private
    assert not (run / "privacy/ledger.jsonl").exists()
    with pytest.raises(AssertionError, match="private values were read"):  # each image a unit: nothing to compare
        run_probe(copy(public_run), shared, unit_column="image")


def test_units_in_both_splits_are_allowed_where_asked_for(
    copy: Copy, public_run: Path, scans: Callable[..., str]
) -> None:
    run, shared = copy(public_run), scans(patient_test=np.arange(TEST) // 4)
    result = run_probe(run, shared, unit_column="patient", allow_shared_units=True)
    assert result["shared_units_allowed"] is True
    assert read_json(run / "run.json")["stages"]["probe"]["config"]["allow_shared_units"] is True
    card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8").replace("\\", "")
    assert "The user allowed units in both splits (--allow-shared-units): images of a patient may be in both" in card
    assert "what the test figures tell about those is not counted in ε" in card.split("## Intended use")[0]
    apart = scans(patient_test=100 + np.arange(TEST) // 4)
    result = run_probe(copy(public_run), apart, unit_column="patient")
    assert "shared_units_allowed" not in result
