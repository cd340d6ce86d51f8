"""A run whose extractor was learned before the data were known: every later stage takes the one for their colour."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rank_processes import context_of, of_rank_0
from safetensors.torch import load_file
from tiny_run import PRETRAIN, PROBE, SIDE, blobs, context, read_json, run_finetune, run_probe

from dprandp import pretrain, probe, tune
from dprandp.audit.loops import Facts
from dprandp.config import schema
from dprandp.errors import CheckpointError, UsageError
from dprandp.pipeline import plan, stage_line
from dprandp.release import load_model
from dprandp.runs.parallel import Ranks
from dprandp.runs.results import PretrainResult
from dprandp.tune import TuneConfig

Copy = Callable[[Path], Path]
COLOURS = ("rgb", "grey")


@pytest.fixture(scope="module")
def data_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Colour -> name of a data set that declares it; the same images but for that."""
    folder, arrays = tmp_path_factory.mktemp("colours"), blobs()
    np.savez(folder / "rgb.npz", **arrays)
    grey = {name: value[..., :1] if name.startswith("x_") else value for name, value in arrays.items()}
    np.savez(folder / "grey.npz", **grey)
    return {colour: f"npz:{folder / colour}.npz" for colour in COLOURS}


@pytest.fixture(scope="module")
def known_run(tmp_path_factory: pytest.TempPathFactory, public_run: Path) -> dict[str, Path]:
    """Colour -> the same run, with an extractor for that colour alone."""
    runs = {}
    for colour in COLOURS:
        runs[colour] = Path(shutil.copytree(public_run, tmp_path_factory.mktemp(colour) / "run"))
        with context(runs[colour], overwrite=True) as given:
            pretrain.run(schema.build("pretrain", PRETRAIN | {"colour": colour}), given)
    return runs


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Colours of the extractors that are loaded from now on."""
    colours: list[str] = []
    load = pretrain._network_of

    def watched(*given):
        network, made_as = load(*given)
        colours.append(made_as.colour)
        return network, made_as

    monkeypatch.setattr(pretrain, "_network_of", watched)
    return colours


@pytest.mark.slow
@pytest.mark.parametrize("colour", COLOURS)
def test_the_models_are_those_of_a_run_that_knew_the_colour(
    copy: Copy, public_run: Path, known_run: dict[str, Path], data_of: dict[str, str], colour: str
) -> None:
    """With the same noise: probe and fine-tune release the same bytes, which hold one extractor and work alone."""
    runs = {"both": copy(public_run), "known": copy(known_run[colour])}
    weights: dict[str, list[bytes]] = {name: [] for name in runs}
    for name, run in runs.items():
        for stage in (run_probe, run_finetune):
            result = stage(run, data_of[colour], {"insecure_seed": 3})
            weights[name].append((run / "model/model.safetensors").read_bytes())
            if stage is run_probe:
                assert result["extractor_colour"] == colour
    assert weights["both"] == weights["known"]
    described = {name: read_json(run / "model/config.json")["extractor"] for name, run in runs.items()}
    assert described["both"] == described["known"]
    assert described["both"]["colour"] == colour
    assert len(weights["both"][1]) < 1.5 * (runs["both"] / "4-finetune/model.safetensors").stat().st_size + 10**6
    shutil.move(runs["both"] / "model", runs["both"].parent / "model")
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3 if colour == "rgb" else 1), dtype=np.uint8)
    alone = load_model(runs["both"].parent / "model").probabilities(images)
    assert (alone == load_model(runs["known"] / "model").probabilities(images)).all()


@pytest.mark.slow
@pytest.mark.parametrize("colour", COLOURS)
def test_every_stage_takes_the_extractor_for_the_data(
    copy: Copy, public_run: Path, data_of: dict[str, str], taken: list[str], colour: str
) -> None:
    run, data = copy(public_run), data_of[colour]
    asked = schema.build("probe", PROBE | {"data": data})
    for on in ("synthetic", "private"):
        with context(copy(public_run)) as given:
            tune.run(asked, TuneConfig(on=on, trials=2), given)
    assert taken == [colour] * 2
    run_probe(run, data)
    run_finetune(run, data)
    assert taken == [colour] * 4
    with context(run) as given:
        Facts(given)  # what an audit's records are made of
    assert taken == [colour] * 5


def seeded_probe(ranks: Ranks, run: Path, data: str) -> None:
    with context_of(ranks, run, insecure_seed=1) as given:
        probe.run(schema.build("probe", PROBE | {"data": data}), given)


def test_several_ranks_take_it_too(copy: Copy, public_run: Path, data_of: dict[str, str]) -> None:
    released = []
    for size in (1, 2):
        run = copy(public_run)
        of_rank_0(size, seeded_probe, run, data_of["grey"])
        released.append(load_file(run / "model/model.safetensors"))
        assert read_json(run / "model/config.json")["extractor"]["colour"] == "grey"
    assert max(float((released[0][name] - value).abs().max()) for name, value in released[1].items()) < 1e-5


def test_a_probe_of_before_goes_on_and_another_second_extractor_makes_it_stale(
    copy: Copy, public_run: Path, data_of: dict[str, str]
) -> None:
    run = copy(public_run)
    first = run_probe(run, data_of["grey"])
    assert run_probe(run, data_of["grey"]) == first
    assert "pretrain/grey/extractor.safetensors" in read_json(run / "run.json")["stages"]["probe"]["inputs"]
    with context(run, overwrite=True) as given:
        pretrain.run(schema.build("pretrain", PRETRAIN | {"seed": 1}), given)
    with pytest.raises(UsageError, match=r"grey/extractor\.safetensors"):
        run_probe(run, data_of["grey"])


def test_a_damaged_second_extractor_is_refused_and_never_replaced_by_the_first(
    copy: Copy, public_run: Path, data_of: dict[str, str]
) -> None:
    damaged = copy(public_run)
    path = damaged / "2-pretrain/grey/extractor.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run_probe(copy(damaged), data_of["rgb"])["extractor_colour"] == "rgb"  # which does not need it
    with pytest.raises(CheckpointError, match=r"grey/extractor\.safetensors"):
        run_probe(damaged, data_of["grey"])


def test_the_plan_and_the_line_say_that_there_are_two(public_run: Path, known_run: dict[str, Path], copy: Copy) -> None:
    plans = {}
    for name, run in {"both": public_run, **known_run}.items():
        with context(copy(run), overwrite=True) as given:
            plans[name] = plan.plan("pretrain", schema.build("pretrain", {"colour": name}), given)
            said = stage_line("pretrain", given.rundir.result(PretrainResult))
            assert ("one for grey data" in said) == (name == "both")
    assert {name: made.extractors for name, made in plans.items()} == {"both": 2, "rgb": 1, "grey": 1}
    assert "600 filters each for colour and for grey data" in plan.plan_lines(plans["both"])
    assert plans["both"].feature_dim == plans["grey"].feature_dim
