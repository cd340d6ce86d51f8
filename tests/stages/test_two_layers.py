"""A run on two layers of patches, from images to a released model: features in two parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import DEEP, PROBE, context, make_public, read_json, run_finetune, run_probe

from dprandp import tune
from dprandp.config import schema
from dprandp.data import open_dataset
from dprandp.release import load_model
from dprandp.tune import TuneConfig


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two-layers") / "run"
    make_public(path, **DEEP)
    return path


@pytest.mark.slow
def test_probe_finetune_and_the_released_model(copy, deep_run: Path, data: str) -> None:
    run = copy(deep_run)
    result = run_probe(run, data)
    model = load_model(run / "model")
    assert (model.network.whitener.components, model.network.whitener.dims) == (32, 64)
    test = open_dataset(data, run).test()
    answers = model.probabilities(test.images).argmax(dim=1).numpy()
    assert (answers == test.labels).mean() == pytest.approx(result["accuracy"])
    assert result["accuracy"] > 0.6  # three classes of coloured blobs
    run_finetune(run, data)
    tuned = load_model(run / "model").network.state_dict()
    for name in ("first.weight", "second.weight", "second.bias"):
        assert not torch.equal(tuned[f"extractor.{name}"], model.network.state_dict()[f"extractor.{name}"]), name
    kept = ("first.basis", "second.map_weight", "second.channel_basis")
    for name in kept:  # by Phase III
        assert torch.equal(tuned[f"extractor.{name}"], model.network.state_dict()[f"extractor.{name}"]), name
    assert read_json(run / "run.json")["stages"]["finetune"]["result"]["epsilon"] <= 4


@pytest.mark.slow
def test_tuning_takes_axes_of_both_parts(copy, deep_run: Path, data: str) -> None:
    run = copy(deep_run)
    with context(run) as given:
        made = tune.run(schema.build("probe", PROBE | {"data": data}), TuneConfig(trials=6), given)
    tried = made.tried
    assert {setting.dims for setting in tried} <= {32, 16}
    assert len({setting.dims for setting in tried}) == 2
