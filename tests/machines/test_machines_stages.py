"""Stages on either kind of processor, with one thread and with several, and a last batch of one image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import (
    CONTINUE,
    PROBE,
    context,
    make_public,
    read_json,
    run_continue,
    run_finetune,
    run_probe,
    run_scratch,
    write_blobs,
)

from dprandp import pretrain, tune
from dprandp.audit.loops import Facts
from dprandp.config.schema import build
from dprandp.dpsgd.features import BATCH
from dprandp.errors import CheckpointError, UsageError
from dprandp.release import load_model
from dprandp.tune import TuneConfig

ODD = BATCH + 1
WIDE = {"arch": "wrn-10-1", "random_init": True}


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Training images of which the last batch of an extraction has one."""
    return write_blobs(tmp_path_factory.mktemp("odd") / "odd.npz", train=ODD, test=ODD)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_blobs(tmp_path_factory.mktemp("small") / "small.npz", train=90, test=30)


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patches") / "run"
    make_public(path)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WRN that a processor without a bfloat16 unit has made."""
    path = tmp_path_factory.mktemp("wide") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPRANDP_PRETEND_BFLOAT16", "0")
        make_public(path, **WIDE)
    return path


def config_of(run: Path, stage: str) -> dict:
    return read_json(run / "run.json")["stages"][stage]["config"]


def features_of(run: Path) -> np.ndarray:
    return np.array(np.load(run / "private" / "features.npy"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_patchnet_of_one_precision_is_the_same_on_every_machine(
    kind: str, patches: Path, odd_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pretraining to prediction; features to the bit for a number of threads, to rounding for any."""
    found = {}
    for unit, threads in (("1", 1), ("0", 1), ("1", 3)):
        monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", unit)
        torch.set_num_threads(threads)
        run = Path(shutil.copytree(patches, tmp_path / f"run-{unit}-{threads}"))
        result = run_probe(run, odd_data, precision=kind)
        assert result["precision"] == config_of(run, "probe")["precision"] == kind
        found[unit, threads] = features_of(run)
        tuned = run_finetune(run, odd_data, steps=2, refit_steps=2)
        assert tuned["precision"] == kind
        probabilities = load_model(run / "model").probabilities(np.zeros((1, 16, 16, 3), np.uint8))
        assert probabilities.isfinite().all()
    np.testing.assert_array_equal(found["1", 1], found["0", 1])
    # the whitening's statistics are sums in another order, whose last digit may round a bfloat16 number the other way,
    # and features are stored as float16
    np.testing.assert_allclose(found["1", 3], found["1", 1], rtol=2e-3, atol=1e-5 if kind == "float32" else 1e-2)
    apart = np.abs(found["1", 3] - found["1", 1]).mean()
    assert apart < 1e-3 * np.abs(found["1", 1]).mean() or kind == "bfloat16"
    assert apart < 1e-2 * np.abs(found["1", 1]).mean()


def test_a_network_computes_as_recorded(wide: Path, small_data: str, tmp_path: Path, processor: str) -> None:
    run, other = (Path(shutil.copytree(wide, tmp_path / name)) for name in ("run", "other"))
    decided = "bfloat16" if processor == "1" else "float32"
    assert config_of(run, "pretrain")["precision"] == "float32"
    assert run_probe(run, small_data)["precision"] == config_of(run, "probe")["precision"] == decided
    assert run_finetune(run, small_data, steps=1, refit_steps=0, batch_size=6)["precision"] == decided
    model = load_model(run / "model")
    assert model.network.extractor.precision == model.result.precision == decided
    assert f"computed in {decided}" in (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert run_scratch(tmp_path / "scratch", small_data, steps=1, batch_size=6)["precision"] == decided
    short = {**CONTINUE, "steps": 2, "switch": "1", "batch_size": 6}
    assert run_continue(other, small_data, **short)["precision"] == decided


@pytest.mark.slow
def test_a_finished_stage_stays_finished_on_another_machine(
    wide: Path, small_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided stands; another precision is another setting, refused by name, and its features are others."""
    run = Path(shutil.copytree(wide, tmp_path / "run"))
    monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", "1")
    first = run_probe(run, small_data)
    half = features_of(run)
    monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", "0")
    assert run_probe(run, small_data) == first
    with pytest.raises(UsageError, match="precision"):
        run_probe(run, small_data, precision="float32")
    again = run_probe(run, small_data, {"overwrite": True})
    assert again["precision"] == "float32"
    difference = np.linalg.norm(features_of(run) - half) / np.linalg.norm(half)
    assert difference > 1e-4  # the file of the first probe would have been found again


@pytest.mark.slow
def test_later_stages_compute_as_the_probe_did(
    wide: Path, small_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that would choose otherwise: fine-tune, tuning and the audit's classifier."""
    run = Path(shutil.copytree(wide, tmp_path / "run"))
    run_probe(run, small_data, precision="bfloat16")
    monkeypatch.setenv("DPRANDP_PRETEND_BFLOAT16", "0")
    asked: list[str] = []
    decided = pretrain.decide
    monkeypatch.setattr(pretrain, "decide", lambda *given: asked.append(given[0]) or decided(*given))
    with context(run) as given:
        assert Facts(given).model.extractor.precision == "bfloat16"
        tune.choose_publicly(build("probe", PROBE | {"data": small_data}), TuneConfig(trials=2), given, {})
    for options in ({}, {"overwrite": True}):  # one budget, so each fine-tunes a copy
        tuned = Path(shutil.copytree(run, tmp_path / f"tuned-{len(options)}"))
        result = run_finetune(tuned, small_data, options, steps=1, refit_steps=0, batch_size=6)
        assert result["precision"] == "bfloat16"
    assert set(asked) == {"bfloat16"}


def test_a_model_of_patches_says_its_precision(patches: Path, small_data: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(patches, tmp_path / "run"))
    run_probe(run, small_data, precision="bfloat16")
    assert load_model(run / "model").network.extractor.precision == "bfloat16"
    path = run / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for wrong in ("float16", None):
        path.write_text(json.dumps(config | {"precision": wrong}), encoding="utf-8")
        with pytest.raises(CheckpointError, match="does not describe a model"):
            load_model(run / "model")
