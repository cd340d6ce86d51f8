"""Files of earlier versions, in which ``optimizer`` was spelt ``optimiser``: they load, and say what they said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import PRETRAIN, context, make_public, run_probe, run_scratch

from dprandp import checkpoint, config, priors
from dprandp.errors import CheckpointError, UsageError
from dprandp.reporting.wording import update_in_words
from dprandp.runresults import wrong_entry
from dprandp.stages import pretrain
from dprandp.stages.context import recorded
from dprandp.stages.released_model import load_model
from dprandp.vision.extractors import build_extractor, load_weights

WIDE = {"arch": "wrn-10-1", "steps": 1, "batch_size": 2, "projection_hidden": 16, "projection_dim": 16}


def respell(path: Path, present: str = '"optimizer"', former: str = '"optimiser"') -> None:
    text = path.read_text(encoding="utf-8")
    assert present in text
    path.write_text(text.replace(present, former), encoding="utf-8")


def test_a_recorded_setting_may_have_its_former_name():
    values = {"arch": "wrn-10-1", "optimiser": "adamw"}
    assert recorded("pretrain", values).optimizer == "adamw"
    with pytest.raises(CheckpointError, match="'optimizzer'"):
        recorded("pretrain", {"arch": "wrn-10-1", "optimizzer": "adamw"})
    with pytest.raises(UsageError) as refused:  # nobody writes the former name any more
        config.build("pretrain", values)
    assert "'optimizer'" in refused.value.fix


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    run = tmp_path / "run"
    make_public(run, **WIDE)
    folder = run / "2-pretrain"
    made = checkpoint.load(folder, pretrain.EXTRACTOR)
    spelt = {"optimiser" if key == "optimizer" else key: value for key, value in made.meta["config"].items()}
    assert "optimiser" in spelt
    checkpoint.save(folder, pretrain.EXTRACTOR, made.tensors, made.meta | {"config": spelt}, keep=1)
    respell(run / "run.json")
    with context(run) as given:
        _, found = pretrain.load_extractor(given, "rgb")
        assert config.as_dict(found) == made.meta["config"]
        with pytest.raises(UsageError, match="optimi") as refused:  # as any setting that another version did not have
            pretrain.run(config.build("pretrain", PRETRAIN | WIDE), given)
    assert "--resume" in refused.value.fix
    with context(run, resume=True) as given:
        assert pretrain.run(config.build("pretrain", PRETRAIN | WIDE), given)["arch"] == "wrn-10-1"


def test_a_released_model_of_an_earlier_version_answers_as_before(tmp_path, data):
    run_scratch(tmp_path / "run", data, steps=1)
    folder = tmp_path / "run/model"
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    before = load_model(folder).probabilities(images)
    respell(folder / "config.json")
    assert (load_model(folder).probabilities(images) == before).all()
    respell(folder / "config.json", '"optimiser"', '"optimizzer"')
    with pytest.raises(CheckpointError, match="describes no network"):
        load_model(folder)


def test_a_card_of_a_prior_may_have_the_former_name():
    name = priors.prior_names()[0]
    card = json.loads((priors.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    card["pretrain"]["optimiser"] = "adamw"
    assert priors.parse(name, card).pretrain.optimizer == "adamw"


def test_a_result_of_an_earlier_version_says_what_was_done():
    said = "Adam on the noisy gradients, momentum 0.9"
    for result in ({"optimizer": said}, {"optimiser": said}):
        assert update_in_words(result).startswith(said)
        assert wrong_entry(result) is None
        assert wrong_entry(dict.fromkeys(result, 7)) in result  # what is shown is looked at first
    assert update_in_words({"momentum": 0.5}).startswith("SGD on the noisy gradients, momentum 0.5")


def test_a_patchnet_of_before_regions_overlapped_keeps_its_quadrants(public_run, copy):
    run = copy(public_run)
    folder = run / "2-pretrain"
    made = checkpoint.load(folder, pretrain.EXTRACTOR)
    assert made.meta["config"]["regions"] == "overlapping"
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    with context(run) as given:
        now = pretrain.load_extractor(given, "rgb")[0].extract(images)
    said = {key: value for key, value in made.meta["config"].items() if key != "regions"}
    checkpoint.save(folder, pretrain.EXTRACTOR, made.tensors, made.meta | {"config": said}, keep=1)
    with context(run) as given:
        extractor, found = pretrain.load_extractor(given, "rgb")
    assert found.regions == "quadrants"
    assert (extractor.extract(images) - now).abs().max() > 0.01
    quadrants = build_extractor(found)
    load_weights(quadrants, made.tensors)
    assert torch.equal(extractor.extract(images), quadrants.extract(images))


def test_a_released_patchnet_of_before_regions_overlapped_answers_as_before(tmp_path, data):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    answers = {}
    for regions in ("quadrants", "overlapping"):
        run = tmp_path / regions
        make_public(run, regions=regions)
        run_probe(run, data, epsilon=math.inf)
        before = load_model(run / "model").probabilities(images)
        config_of = json.loads((run / "model/config.json").read_text(encoding="utf-8"))
        assert config_of["extractor"].pop("regions") == regions
        (run / "model/config.json").write_text(json.dumps(config_of), encoding="utf-8")
        answers[regions] = bool((load_model(run / "model").probabilities(images) == before).all())
    assert answers == {"quadrants": True, "overlapping": False}  # only the first could have been written so
