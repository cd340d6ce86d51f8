"""A shipped prior in place of generate and pretrain: the same probe as in the run it came from, or a refusal."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from tiny_run import GENERATE, PRETRAIN, PROBE, context, make_public, read_json, run_finetune, run_probe

from dprandp import generate, pipeline, priors, probe
from dprandp.cli import app
from dprandp.config import schema
from dprandp.data import open_dataset
from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.generate import blocks_of, load_images
from dprandp.report.card import model_card
from dprandp.report.disclosure import disclosure
from dprandp.runs.checkpoint import tensors_from_bytes, tensors_to_bytes
from dprandp.runs.directory import frozen
from dprandp.runs.results import read_result

ROOT = Path(__file__).resolve().parents[2]
IMAGES = PROBE["statistics_images"]


def make_prior_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_prior", ROOT / "scripts" / "make_prior.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def make_prior(run: Path, out: Path, name: str = "tiny-test", **options: object) -> dict:
    """scripts/make_prior.py, in this process."""
    script = make_prior_script()
    script.FLAGS = {stage: (*flags, *PRETRAIN) for stage, flags in script.FLAGS.items()}  # the sizes of tests
    given = {"name": name, "run": run, "results": None, "note": None, "out": out} | options
    return script.write(argparse.Namespace(**given))


@pytest.fixture(scope="module")
def public_run(tmp_path_factory) -> Path:
    """A run whose extractor is for colour alone, as a prior is for one kind."""
    path = tmp_path_factory.mktemp("for-colour") / "run"
    make_public(path, colour="rgb")
    return path


@pytest.fixture(scope="module")
def probed_run(tmp_path_factory, public_run, data) -> Path:
    path = Path(shutil.copytree(public_run, tmp_path_factory.mktemp("probed") / "run"))
    run_probe(path, data)
    return path


@pytest.fixture
def folder(tmp_path, public_run, monkeypatch) -> Path:
    """A folder of priors with one, made from the tiny public run."""
    path = tmp_path / "priors"
    path.mkdir()
    make_prior(public_run, path)
    monkeypatch.setattr(priors, "FOLDER", path)
    return path


def adopt(run: Path, name: str = "tiny-test", **options: object) -> None:
    with context(run, **options) as given:
        pipeline.adopt(priors.public_stages(name, IMAGES), given)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


# ----------------------------------------------------------------------------------------------------- sampled images


@pytest.mark.parametrize(("count", "sample"), [(150, 1), (150, 120)])
def test_a_sample_holds_the_images_that_would_be_taken_of_all(tmp_path, count, sample):
    """dead-leaves has blocks of 100; a short last block leaves its part to the others."""
    runs = {}
    for name, extra in (("all", {}), ("sample", {"sample": sample})):
        with context(tmp_path / name) as given:
            recipe = schema.build("generate", {"process": "dead-leaves", "count": count, "resolution": 8, **extra})
            runs[name] = generate.run(recipe, given)
    full, sampled = (load_images(tmp_path / name / "1-generate", sample) for name in runs)
    assert np.array_equal(full, sampled)
    assert runs["sample"].count == sample == len(load_images(tmp_path / "sample/1-generate"))
    some = max(1, sample // 2)  # a smaller sample of the sample is a smaller sample of all
    folders = (tmp_path / name / "1-generate" for name in runs)
    assert np.array_equal(*(load_images(path, some) for path in folders))


def test_more_than_all_is_refused_and_without_a_sample_nothing_changes(tmp_path):
    with context(tmp_path / "run") as given, pytest.raises(UsageError, match="a sample of 61"):
        generate.run(schema.build("generate", GENERATE | {"sample": 61}), given)
    assert blocks_of(schema.build("generate", GENERATE | {"count": 250})) == {0: 100, 1: 100, 2: 50}


# ----------------------------------------------------------------------------------------------------- the same probe


def test_a_probe_with_the_prior_is_the_probe_of_the_run_it_came_from(tmp_path, folder, probed_run, data):
    run = tmp_path / "run"
    adopt(run)
    result = run_probe(run, data)
    for file in ("2-pretrain/extractor.safetensors", "3-probe/statistics/whitener.safetensors"):
        one, other = (tensors_from_bytes((folder / file).read_bytes(), file) for folder in (run, probed_run))
        assert tensors_to_bytes(one) == tensors_to_bytes(other), file  # how they were made stands in the header
    assert len(load_images(run / "1-generate")) == IMAGES < GENERATE["count"]
    own, before = read_json(run / "run.json")["stages"], read_json(probed_run / "run.json")["stages"]
    card = priors.read_card("tiny-test")
    assert own["pretrain"]["inputs"]["prior/tiny-test"] == card.sha256
    assert own["pretrain"]["config"] == before["pretrain"]["config"] | {"prior": "tiny-test"}
    result, made = read_result("probe", frozen(result)), read_result("pretrain", own["pretrain"]["result"])
    assert (made.prior, made.prior_sha256, made.prior_images) == ("tiny-test", card.sha256, GENERATE["count"])
    assert made.knn_accuracy == before["pretrain"]["result"]["knn_accuracy"]  # of the card
    # everybody who reads of ε reads of the prior
    generated = read_result("generate", own["generate"]["result"])
    said = dict(disclosure(result, made, generated))["Public inputs"]
    written = model_card(result, made, generated)
    for text in (said, written.replace("\\", ""), (run / "model/MODEL_CARD.md").read_text().replace("\\", "")):
        assert f"the prior tiny-test that dprandp ships (sha256 {card.sha256})" in text
        assert "learned from 60 synthetic images of the random process dead-leaves" in text
    assert f"for its statistics {IMAGES} synthetic images" in said


@pytest.mark.slow
def test_a_fine_tune_follows(tmp_path, folder, data):
    adopt(tmp_path / "run")
    run_probe(tmp_path / "run", data)
    assert run_finetune(tmp_path / "run", data)["arch"] == "patchnet"
    assert "the prior tiny" in (tmp_path / "run/model/MODEL_CARD.md").read_text().replace("\\", "")


def test_again_nothing_is_done_and_another_extractor_is_not_replaced_unasked(tmp_path, folder, copy, public_run):
    run = tmp_path / "run"
    adopt(run)
    before = read_json(run / "run.json")
    adopt(run)
    adopt(run, overwrite=True)  # it is the probe that is overwritten
    assert read_json(run / "run.json") == before
    own = copy(public_run)
    with pytest.raises(UsageError, match="has made its own images"):
        adopt(own)
    adopt(own, overwrite=True)
    assert read_json(own / "run.json")["stages"]["pretrain"]["result"]["prior"] == "tiny-test"


def test_what_learns_the_prior_anew_is_refused(tmp_path, folder, public_run):
    with context(tmp_path / "run") as given:
        stages = priors.public_stages("tiny-test", IMAGES)
        pipeline.run_stage("generate", stages["generate"], given)
        wrong = schema.build("pretrain", PRETRAIN | {"prior": "tiny-test", "colour": "rgb", "filters": 17})
        with pytest.raises(UsageError, match="other settings: filters = 16"):
            pipeline.run_stage("pretrain", wrong, given)
    assert not (tmp_path / "run/2-pretrain").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


SELDOM = [pytest.param(damage, marks=pytest.mark.slow) for damage in ("cut", "card of another", "no JSON", "newer")]


@pytest.mark.parametrize("damage", ["flipped", "missing", "card", *SELDOM])
def test_a_damaged_prior_is_refused_with_exit_code_4_before_anything_is_written(tmp_path, folder, damage):
    tensors, card = folder / "tiny-test.safetensors", folder / "tiny-test.json"
    stages = priors.public_stages("tiny-test", IMAGES)
    if damage == "flipped":
        flip(tensors)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no JSON":
        card.write_text("{")
    else:
        change = {
            "card": {"sha256": "0" * 64}, "card of another": {"name": "other"}, "newer": {"format": 2}
        }[damage]  # fmt: skip
        card.write_text(json.dumps(read_json(card) | change))
    with context(tmp_path / "run") as given:
        pipeline.run_stage("generate", stages["generate"], given)
        with pytest.raises(CheckpointError) as refused:
            pipeline.run_stage("pretrain", stages["pretrain"], given)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "run/2-pretrain").exists()
    rows = priors.table()
    assert rows[0].problem == refused.value.problem
    assert "DAMAGED" in priors.lines(rows)
    with pytest.raises(CheckpointError):
        priors.check(rows)


def test_tensors_that_do_not_fit_their_card_are_refused(folder):
    card = read_json(folder / "tiny-test.json")
    for change, said in (({"filters": 17}, "does not fit its card"), ({"colour": "both"}, "is damaged")):
        changed = card | {"pretrain": card["pretrain"] | change}  # the hash is right
        (folder / "tiny-test.json").write_text(json.dumps(changed))
        assert said in priors.table()[0].problem


def test_an_unknown_prior_names_the_nearest(folder):
    with pytest.raises(UsageError) as refused:
        priors.public_stages("tiny-tset")
    assert "did you mean 'tiny-test'" in refused.value.fix
    for name in ("../tiny-test", "", "a/b"):
        with pytest.raises(UsageError):
            priors.public_stages(name)


@pytest.mark.slow
def test_only_a_learned_extractor_becomes_a_prior_and_only_one(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="needs stage 'pretrain'"):
        make_prior(tmp_path / "empty", folder)
    adopt(tmp_path / "run")
    make_public(tmp_path / "random", random_init=True)
    make_public(tmp_path / "both")
    for name, said in (("run", "own"), ("random", "own"), ("both", r"two extractors.*--colour")):
        with pytest.raises(SystemExit, match=said):
            make_prior(tmp_path / name, folder, "again")


def test_results_on_the_card_are_of_these_very_tensors(tmp_path, folder, public_run):
    sha = priors.read_card("tiny-test").sha256
    row = {"data": "digits", "size": "tiny", "extractor": "prior:tiny-test", "stage": "probe", "epsilon": "1",
           "delta": 1e-5}  # fmt: skip
    own = [row | {"accuracy": 0.7, "extractor_sha256": sha},
           row | {"accuracy": 0.9, "extractor": "learned", "extractor_sha256": sha}]  # fmt: skip
    others = [{"extractor_sha256": "0" * 64}, {"extractor_sha256": sha, "stage": "finetune"}]
    once = row | {"data": "cifar10", "accuracy": 0.25, "extractor_sha256": sha}
    rows = [*own, once, *(row | {"accuracy": 0.1} | other for other in others)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    make_prior(public_run, folder, results=tmp_path / "results.jsonl")
    alone, measured = priors.read_card("tiny-test").probes
    assert (alone.accuracy, alone.seeds, alone.deviation) == (0.25, 1, None)
    assert (measured.accuracy, measured.seeds) == (pytest.approx(0.8), 2)
    assert measured.deviation == pytest.approx(0.2 / 2**0.5)
    text = (folder / "tiny-test.md").read_text()
    assert "80.0 ± 14.1 | 2 |" in text
    assert "| 25.0 | 1 |" in text


@pytest.mark.parametrize(
    ("colour", "channels", "warns"),
    [("both", 1, False), ("both", 3, False), ("rgb", 3, False), ("grey", 1, False), ("rgb", 1, True),
     ("grey", 3, True)],
)  # fmt: skip
def test_an_extractor_of_the_other_colour_is_told_of(colour, channels, warns):
    spec = open_dataset("fashion-mnist" if channels == 1 else "cifar10", Path("nowhere")).spec
    warning = probe.colour_warning(colour, spec)
    assert (warning is not None) == warns
    if warns:
        assert f"learned from {colour} images" in warning
        assert f"--colour {'grey' if channels == 1 else 'rgb'}`" in warning


# -------------------------------------------------------------------------------------------------- those that do ship


@pytest.mark.parametrize("name", priors.prior_names())
def test_a_shipped_prior_is_whole_small_and_says_how_it_was_made(name):
    (row,) = (row for row in priors.table() if row.name == name)
    assert row.problem is None
    tensors = priors.FOLDER / f"{name}.safetensors"
    card = priors.read_card(name)
    assert tensors.stat().st_size == card.bytes <= 12 * 2**20
    assert (priors.FOLDER / f"{name}.md").read_text(encoding="utf-8") == make_prior_script().card_text(card)
    assert card.result.random_init is False
    # the commands on the card are those of its configurations
    group = typer.main.get_command(app)
    for command, wanted in zip(card.commands, (card.generate, card.pretrain), strict=True):
        _, stage, *words = command.split()
        flags = group.commands[stage].make_context(stage, words).params
        given = {key: flags.get(key) for key in schema.as_dict(wanted) if key in flags}
        assert schema.as_dict(schema.resolve(stage, flags["size"], None, given)) == schema.as_dict(wanted)


def test_the_files_of_every_prior_are_there():
    names = {path.name for path in priors.FOLDER.iterdir() if path.suffix in (".json", ".md", ".safetensors")}
    assert names == {f"{name}.{kind}" for name in priors.prior_names() for kind in ("json", "md", "safetensors")}
    assert {"patchnet-tiny", "patchnet-tiny-grey", "patchnet-small"} <= set(priors.prior_names())
