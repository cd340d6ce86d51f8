"""An extractor from sixty tiny synthetic images, by both ways to learn: what is written, repeated, resumed."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from stage_processes import Stages

from dprandp.config.schema import PretrainConfig, build
from dprandp.errors import CheckpointError
from dprandp.generate import load_images
from dprandp.models.extractor import extract
from dprandp.models.patchnet import PatchExtractor
from dprandp.pretrain import contrastive, load_extractor, synthetic_crops
from dprandp.pretrain.contrastive import MEASURES
from dprandp.runs import checkpoint
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir, frozen
from dprandp.runs.results import PretrainResult
from dprandp.runs.signals import graceful_stop

IMAGES = {"process": "dead-leaves", "count": 60, "resolution": 32}
PATCHNET = {"arch": "patchnet", "filters": 24, "layers": 1, "dictionary_patches": 3000, "dictionary_iterations": 3}
WRN = {"arch": "wrn-10-1", "steps": 12, "batch_size": 6, "projection_hidden": 32, "projection_dim": 8,
       "checkpoint_every": 4}  # fmt: skip
TWO_LAYERS = {**PATCHNET, "layers": 2, "second_filters": 20, "colour": "rgb"}
RECIPES = {"patchnet": PATCHNET, "two layers": TWO_LAYERS, "wrn": WRN}
KILLED = -signal.SIGKILL
TIMES = ("seconds", "views_per_second")


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages()


@pytest.fixture(scope="module")
def images(stages, tmp_path_factory) -> Path:
    """A run that has generated."""
    run = tmp_path_factory.mktemp("images") / "run"
    stages.must("generate", run, IMAGES)
    return run


@pytest.fixture
def fresh(images, tmp_path) -> Path:
    """A copy of it to go on from."""
    return Path(shutil.copytree(images, tmp_path / "run"))


@pytest.fixture(scope="module")
def learned(stages, images, tmp_path_factory):
    """Each recipe in one go: name -> (run, result)."""
    runs = {}
    for name, recipe in RECIPES.items():
        run = Path(shutil.copytree(images, tmp_path_factory.mktemp(name) / "run"))
        runs[name] = run, stages.must("pretrain", run, recipe)
    return runs


def files(run: Path) -> dict[str, bytes]:
    folder = run / "2-pretrain"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(run: Path) -> bytes:
    return files(run)["extractor.safetensors"]


def timeless(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in TIMES}


def context_of(run: Path) -> Context:
    return Context(RunDir.open(run, create=False), Console(quiet=True), torch.device("cpu"), run)


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("name", RECIPES)
def test_the_result_the_files_and_the_loaded_extractor(learned, name):
    run, result = learned[name]
    assert set(result) == {
        "arch", "random_init", "parameters", "feature_dim", "precision", "steps", "views_per_second", "loss", "seconds",
        *MEASURES,
        *({"wrn": {"optimizer"}, "patchnet": {"grey"}}.get(name, ())),
    }  # fmt: skip
    if name == "wrn":
        assert result["steps"] == 12
        assert result["views_per_second"] > 0
        assert math.isfinite(result["loss"])
        assert result["loss"] < 0
    else:
        assert (result["steps"], result["views_per_second"], result["loss"]) == (3, None, None)
    own = ["LATEST", "extractor.safetensors", "filters.png", "metrics.jsonl"]  # the checkpoints on the way are gone
    grey = [f"grey/{file}" for file in own] if name == "patchnet" else []
    assert sorted(files(run)) == sorted([*own, "config.toml", *grey])
    assert frozen(RunDir.open(run, create=False).result(PretrainResult)) == result
    network, config = load_extractor(context_of(run), "rgb")
    decided = {"colour": "both" if name == "wrn" else "rgb", "precision": result["precision"]}
    assert config == PretrainConfig(**RECIPES[name] | decided)
    assert not network.training
    assert network.feature_dim == result["feature_dim"]
    assert sum(parameter.numel() for parameter in network.parameters()) == result["parameters"]
    features = extract(network, synthetic_crops(context_of(run), 60, 32, 0), mirror=False)
    assert features.isfinite().all()
    assert features.std(dim=0).max() > 0


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in files(run)["metrics.jsonl"].splitlines()]


def test_metrics_are_written_step_by_step(learned):
    lines, passes, twice = (metrics(learned[name][0]) for name in ("wrn", "patchnet", "two layers"))
    assert [line["step"] for line in lines] == [10, 12]
    assert learned["wrn"][1]["loss"] == pytest.approx(lines[-1]["loss"], abs=1e-5)
    assert [line["step"] for line in passes] == [1, 2, 3]
    assert [line["step"] for line in twice] == list(range(1, 10))  # three dictionaries
    assert twice[:3] == passes
    similarities = [line["similarity"] for line in passes]
    assert similarities == sorted(similarities)  # k-means gets nearer
    # another crop of the same image among the 15 held out: by chance 6 are right with probability below 1e-3
    assert learned["patchnet"][1]["knn_accuracy"] > 6 / 15


def test_the_random_control_learns_nothing_and_differs(stages, learned, fresh):
    result = stages.must("pretrain", fresh, {**PATCHNET, "random_init": True})
    assert result["random_init"] is True
    assert result["steps"] == 0
    assert "grey" not in result  # one network serves both colours
    (control, _), (same, _) = (load_extractor(context_of(fresh), colour) for colour in ("rgb", "grey"))
    assert torch.equal(control.weight, same.weight)
    network, _ = load_extractor(context_of(learned["patchnet"][0]), "rgb")
    assert control.weight.shape == network.weight.shape
    assert not torch.allclose(control.weight, network.weight, rtol=0.1)
    torch.testing.assert_close(control.weight.norm(dim=1), torch.ones(24))
    assert control.bias.eq(0).all()
    before = weights(fresh)
    stages.must("pretrain", fresh, {**PATCHNET, "random_init": True, "seed": 1}, overwrite=True)
    assert weights(fresh) != before


# ---------------------------------------------------------------------------------------------------------- repeating


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patchnet", "wrn"])
def test_the_same_seed_repeats_every_byte_and_another_does_not(stages, learned, images, tmp_path, name):
    run, result = learned[name]
    for folder in ("again", "other"):
        shutil.copytree(images, tmp_path / folder)
    again = stages.must("pretrain", tmp_path / "again", RECIPES[name])
    assert files(tmp_path / "again") == files(run)
    assert timeless(again) == timeless(result)
    stages.must("pretrain", tmp_path / "other", {**RECIPES[name], "seed": 1})
    assert weights(tmp_path / "other") != weights(run)


def test_where_the_colour_is_not_known_there_is_the_very_extractor_of_each(stages, learned, fresh, tmp_path):
    """Every byte as if the colour had been given, each in its own place; the two differ."""
    run, result = learned["patchnet"]
    known = {colour: Path(shutil.copytree(fresh, tmp_path / colour)) for colour in ("rgb", "grey")}
    alone = {colour: stages.must("pretrain", path, {**PATCHNET, "colour": colour}) for colour, path in known.items()}
    made = files(run)
    for colour, folder in (("rgb", ""), ("grey", "grey/")):
        expected = files(known[colour])
        del expected["config.toml"]
        assert {name: made[folder + name] for name in expected} == expected
        decided = {"colour": colour, "precision": result["precision"]}
        assert load_extractor(context_of(run), colour)[1] == PretrainConfig(**PATCHNET | decided)
        assert not (known[colour] / "2-pretrain" / "grey").exists()
        assert load_extractor(context_of(known[colour]), "rgb")[1].colour == colour  # the only one there is
    assert made["extractor.safetensors"] != made["grey/extractor.safetensors"]
    assert {name: value for name, value in timeless(result).items() if name != "grey"} == timeless(alone["rgb"])
    assert result["grey"] == {name: alone["grey"][name] for name in MEASURES}


def test_crops_are_public_functions_of_the_seed(learned):
    context = context_of(learned["patchnet"][0])
    assert torch.equal(synthetic_crops(context, 20, 32, 0), synthetic_crops(context, 20, 32, 0))
    assert not torch.equal(synthetic_crops(context, 20, 32, 0), synthetic_crops(context, 20, 32, 1))
    assert synthetic_crops(context, 20, 32, 0).shape == (20, 3, 32, 32)
    assert len(synthetic_crops(context, 1000, 32, 0)) == 60


# ------------------------------------------------------------------------------------------------------------ resuming


# The checkpoints of 12 steps, one every 4, and the extractor: each moves LATEST once.
@pytest.mark.parametrize(
    "fault",
    [
        "pointer-moved:2",
        pytest.param("pointer-moved:1", marks=pytest.mark.slow),
        "pointer-moved:3",
        pytest.param("temp-written:6", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_uninterrupted(stages, learned, fresh, fault):
    assert stages.run("pretrain", fresh, WRN, fault=fault).code == KILLED
    assert RunDir.open(fresh, create=False).row("pretrain").state == "partial"
    result = stages.must("pretrain", fresh, WRN)
    run, expected = learned["wrn"]
    assert files(fresh) == files(run)
    assert timeless(result) == timeless(expected)


def test_a_resumed_stage_goes_on_from_its_checkpoint(stages, learned, fresh):
    """It does not merely start again: a checkpoint that was swapped for another's state shows in the end."""
    assert stages.run("pretrain", fresh, WRN, fault="pointer-moved:2").code == KILLED
    folder = fresh / "2-pretrain"
    saved = checkpoint.load(folder)
    assert (saved.name, saved.meta["step"]) == ("step-0000008", 8)
    moved = {name: tensor + 1e-3 if tensor.is_floating_point() else tensor for name, tensor in saved.tensors.items()}
    checkpoint.save(folder, saved.name, moved, saved.meta)
    stages.must("pretrain", fresh, WRN)
    assert weights(fresh) != weights(learned["wrn"][0])


def test_a_checkpoint_without_all_that_a_step_depends_on_is_refused_by_name(stages, fresh):
    assert stages.run("pretrain", fresh, WRN, fault="pointer-moved:1").code == KILLED
    folder = fresh / "2-pretrain"
    saved = checkpoint.load(folder)
    fewer = {name: tensor for name, tensor in saved.tensors.items() if "momentum_buffer" not in name}
    checkpoint.save(folder, saved.name, fewer, saved.meta)
    outcome = stages.run("pretrain", fresh, WRN)
    assert outcome.code == 4
    assert f"{saved.name}.safetensors has no tensor 'optimizer.momentum_buffer.network." in outcome.result["problem"]


def test_the_line_of_a_checkpoints_own_step_survives_a_crash(stages, learned, fresh):
    every_ten = {**WRN, "checkpoint_every": 10}
    assert stages.run("pretrain", fresh, every_ten, fault="pointer-moved:1").code == KILLED
    stages.must("pretrain", fresh, every_ten)
    assert files(fresh)["metrics.jsonl"] == files(learned["wrn"][0])["metrics.jsonl"]


# Both extractors move LATEST of their folder, each after three files were written: grey first.
@pytest.mark.parametrize("fault", ["pointer-moved:1", "temp-written:3", "pointer-moved:2"])
def test_patchnet_killed_and_repeated(stages, learned, fresh, fault):
    assert stages.run("pretrain", fresh, PATCHNET, fault=fault).code == KILLED
    result = stages.must("pretrain", fresh, PATCHNET)
    assert files(fresh) == files(learned["patchnet"][0])
    assert timeless(result) == timeless(learned["patchnet"][1])


def test_killed_between_the_two_extractors_the_finished_one_is_kept(stages, fresh):
    """It is not merely learned again: an extractor that was swapped for another stays."""
    assert stages.run("pretrain", fresh, PATCHNET, fault="pointer-moved:1").code == KILLED
    folder = fresh / "2-pretrain" / "grey"
    assert not (fresh / "2-pretrain" / "extractor.safetensors").exists()
    saved = checkpoint.load(folder)
    moved = {name: tensor + 1e-3 for name, tensor in saved.tensors.items()}
    checkpoint.save(folder, saved.name, moved, saved.meta)
    stages.must("pretrain", fresh, PATCHNET)
    network = load_extractor(context_of(fresh), "grey")[0]
    assert torch.equal(network.weight, moved["weight"])


@pytest.mark.slow
def test_a_finished_stage_is_skipped_lost_files_are_noticed_and_other_images_not_mixed_in(stages, fresh):
    first = stages.must("pretrain", fresh, PATCHNET)
    before = files(fresh)
    for options in ({}, {"resume": True}):
        assert stages.must("pretrain", fresh, PATCHNET, **options) == first
    assert stages.run("pretrain", fresh, {**PATCHNET, "colour": "grey"}).code == 2
    assert files(fresh) == before
    (fresh / "2-pretrain" / "grey" / "extractor.safetensors").unlink()
    outcome = stages.run("pretrain", fresh, PATCHNET)
    assert outcome.code == 2
    assert "grey/extractor.safetensors is missing" in outcome.result["problem"]
    stages.must("pretrain", fresh, PATCHNET, overwrite=True)
    assert files(fresh) == before
    stages.must("generate", fresh, {**IMAGES, "seed": 9}, overwrite=True)
    outcome = stages.run("pretrain", fresh, PATCHNET)
    assert outcome.code == 2
    assert "manifest.json changed" in outcome.result["problem"]
    stages.must("pretrain", fresh, PATCHNET, overwrite=True)
    assert weights(fresh) != before["extractor.safetensors"]


@pytest.mark.slow
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(stages, learned, fresh):
    assert stages.run("pretrain", fresh, WRN, fault="pointer-moved:2").code == KILLED
    newest = fresh / "2-pretrain" / "step-0000008.safetensors"
    data = newest.read_bytes()
    newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    stages.must("pretrain", fresh, WRN)
    assert weights(fresh) == weights(learned["wrn"][0])


# ---------------------------------------------------------------------------------------------------- what is held out


def test_features_are_looked_at_during_the_training(fresh, monkeypatch):
    """Steps that the configuration alone decides, for little of the time; lines like those of the end."""
    assert contrastive.steps_between_looks(PretrainConfig(arch="wrn-16-4")) == 34
    assert contrastive.steps_between_looks(PretrainConfig(batch_size=256, steps=82_000)) == 1640
    looking = {**WRN, "batch_size": 400, "steps": 6, "checkpoint_every": 10}  # every third step
    context, lines = context_of(fresh), []
    steps = range(1, 7)
    monkeypatch.setattr(contrastive, "train", lambda trainer, first, on_step: sum(on_step(s, 0.5) or 1 for s in steps))
    monkeypatch.setattr(contrastive.MetricsLog, "write", lambda self, **line: lines.append(line))
    context.rundir.stage_dir("pretrain").mkdir()
    with graceful_stop() as stop:
        learned = contrastive.learn(build("pretrain", looking), context, stop)
    assert learned.loss == 6  # our stand-in's
    seen = [line for line in lines if "knn_accuracy" in line]
    assert [line["step"] for line in seen] == [3]  # at the end the result says it
    assert set(seen[0]) == {"step", *MEASURES}


def test_no_image_that_features_are_judged_by_was_trained_on(images):
    context = context_of(images)
    held = contrastive.held_out_images(context)
    images_of = contrastive.begun_trainer(build("pretrain", {**WRN, "colour": "rgb"}), context).images
    trained = {image.numpy().tobytes() for image in images_of[torch.arange(len(images_of))]}
    assert (len(held), len(trained)) == (15, 45)
    assert not trained & {image.numpy().tobytes() for image in held[torch.arange(len(held))]}
    everything = load_images(images / "1-generate")
    assert len({image.transpose(2, 0, 1).tobytes() for image in everything} - trained) == 15


def test_of_few_images_none_is_held_out(stages, tmp_path):
    stages.must("generate", tmp_path / "run", {**IMAGES, "count": 7})
    result = stages.must("pretrain", tmp_path / "run", {**WRN, "steps": 1})
    assert {result[name] for name in MEASURES} == {None}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("recipe", "code", "said"),
    [
        ({"arch": "resnet"}, 2, "unknown architecture 'resnet'"),
        ({"arch": "patchnet", "patch_size": 40}, 2, "patch_size = 40"),
        ({**WRN, "layer_order": "conv-only"}, 2, "layer_order = 'conv-only' is unknown"),
    ],
)
def test_an_impossible_extractor_is_refused_before_anything_is_written(stages, fresh, recipe, code, said):
    outcome = stages.run("pretrain", fresh, recipe)
    assert outcome.code == code
    assert said in outcome.result["problem"]
    assert not (fresh / "2-pretrain").exists()


def test_without_images_or_with_damaged_ones_it_is_refused(stages, fresh, tmp_path):
    outcome = stages.run("pretrain", tmp_path / "none", PATCHNET)
    assert outcome.code == 3
    assert "dprandp generate" in outcome.result["fix"]
    path = fresh / "1-generate" / "shard-00000.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    outcome = stages.run("pretrain", fresh, PATCHNET)
    assert outcome.code == 4
    assert "shard-00000.npy" in outcome.result["problem"]


def test_features_of_another_version_are_refused(stages, learned, tmp_path, monkeypatch):
    """Same weights and other features: what was fitted to the earlier ones would be wrong without a word."""
    run = Path(shutil.copytree(learned["patchnet"][0], tmp_path / "run"))
    monkeypatch.setattr(PatchExtractor, "form", PatchExtractor.form + 1)
    with pytest.raises(CheckpointError, match="another version of dprandp, whose features were others"):
        load_extractor(context_of(run), "rgb")
    assert load_extractor(context_of(learned["wrn"][0]), "rgb")


def test_a_patchnet_that_does_not_say_its_layers_is_refused(learned, tmp_path):
    """One layer was the default once, and was not recorded."""
    run = Path(shutil.copytree(learned["patchnet"][0], tmp_path / "run"))
    saved = checkpoint.load_finished(run / "2-pretrain", "extractor", "pretrain")
    assert saved.meta["config"].pop("layers") == 1
    checkpoint.save(run / "2-pretrain", "extractor", saved.tensors, saved.meta, keep=1)
    with pytest.raises(CheckpointError, match="of one layer; this version"):
        load_extractor(context_of(run), "rgb")
