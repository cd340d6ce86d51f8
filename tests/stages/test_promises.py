"""Promises 9 and 17: nothing is learned from private data but through noise, and nothing private is released."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tripwire
from private_runs import KINDS, run_kind, write_records
from tiny_run import (
    TEST,
    Recorder,
    blobs,
    context,
    ledger_of,
    metrics_of,
    read_json,
    run_finetune,
    run_probe,
    run_scratch,
    write_blobs,
)
from torch import Tensor

from dprandp import data as datasets
from dprandp import finetune, probe
from dprandp.dpsgd import features as features_module
from dprandp.dpsgd import release
from dprandp.models import dictionary, whitening
from dprandp.models.extractor import extract
from dprandp.pretrain import load_extractor
from dprandp.privacy.randomness import PoissonSampler
from dprandp.runs.directory import RunDir

Copy = Callable[[Path], Path]
Record = Callable[[Path], Recorder]
Patch = pytest.MonkeyPatch


# --------------------------------------------------------------------------------------------- 9: no private statistics


@pytest.fixture
def watched_data(tmp_path: Path) -> str:
    return write_blobs(tmp_path / "watched.npz", train=tripwire.EXAMPLES)


def test_9_nothing_is_computed_over_private_examples(
    copy: Copy, public_run: Path, watched_data: str, monkeypatch: Patch
) -> None:
    run = copy(public_run)
    sums = tripwire.install(monkeypatch)
    with tripwire.watching():
        run_probe(run, watched_data, batch_size=30, steps=4)
        run_finetune(run, watched_data, views=2)
    assert sums == ["head"] * 4 + ["all"] * 4 + ["head"] * 6


def test_9_nor_with_views_of_the_features_or_a_wrn(
    copy: Copy, wide_run: Path, watched_data: str, monkeypatch: Patch
) -> None:
    run = copy(wide_run)
    sums = tripwire.install(monkeypatch)
    with tripwire.watching():
        run_probe(run, watched_data, views=2, steps=3)
        run_finetune(run, watched_data, steps=1, refit_steps=0)
    assert sums == ["head"] * 3 + ["all"]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "probe of batches and views"])
def test_9_nor_in_any_other_stage(
    request: pytest.FixtureRequest, copy: Copy, tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    kind = KINDS[name]
    run = tmp_path / "empty" if kind.source is None else copy(request.getfixturevalue(kind.source))
    data = write_records(tmp_path / "watched.npz", kind, tripwire.EXAMPLES)
    sums = tripwire.install(monkeypatch)
    with tripwire.watching():
        run_kind(kind, run, data)
    charged = ledger_of(run)
    assert charged.examples == tripwire.EXAMPLES
    steps = sum(charge.steps for charge in charged.charges)
    assert len(sums) == steps if name != "tune" else sums.count("score") >= 1


def numbers(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.1


STATISTICS: dict[str, Callable[[], Any]] = {
    "mean": lambda: numbers(117, 5).mean(dim=0),
    "mean of all": lambda: numbers(117, 5).mean(),
    "std": lambda: numbers(117, 5).std(dim=0),
    "var of a batch": lambda: numbers(29, 5).var(dim=0),
    "maximum": lambda: numbers(117, 5).amax(),
    "covariance": lambda: torch.cov(numbers(117, 5).T),
    "second moment": lambda: numbers(117, 5).T @ numbers(117, 5),
    "eigenvalues": lambda: torch.linalg.eigvalsh(numbers(5, 117) @ numbers(117, 5)),
    "singular values": lambda: torch.linalg.svd(numbers(117, 5)),
    "quantile": lambda: numbers(117, 5).quantile(0.9),
    "histogram": lambda: torch.histc(numbers(117), 10),
    "classes": lambda: torch.arange(117).remainder(3).unique(),
    "class counts": lambda: torch.bincount(torch.arange(117) % 3),
    "class means": lambda: torch.zeros(3, 5).index_add_(0, torch.arange(117) % 3, numbers(117, 5)),
    "whitening": lambda: whitening.fit(numbers(117, 5), 4),
    "patch whitening": lambda: dictionary.whitening(numbers(117, 5), 4),
    "batch normalisation": lambda: torch.nn.BatchNorm1d(5)(numbers(29, 5)),
    "one number out": lambda: numbers(117).sum().item(),
    "numpy unique": lambda: np.unique((np.arange(117) % 3).view(tripwire.Watched)),
    "numpy mean": lambda: np.mean(np.ones((117, 4)).view(tripwire.Watched), axis=0),
    "numpy method": lambda: np.ones((117, 4)).view(tripwire.Watched).std(axis=0),
    "numpy maximum": lambda: np.ones((117, 4)).view(tripwire.Watched).max(),
    "numpy counts": lambda: np.bincount((np.arange(117) % 3).view(tripwire.Watched)),
    "numpy covariance": lambda: np.cov(np.ones((117, 4)).view(tripwire.Watched).T),
    "numpy list": lambda: np.ones(117).view(tripwire.Watched).tolist(),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_9_control_statistics_trip(name: str) -> None:
    with tripwire.watching(), pytest.raises(tripwire.Tripped):
        STATISTICS[name]()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: x[3], lambda x: x[:40], lambda x: x * 2 - 1, lambda x: x @ numbers(5, 4), lambda x: x.mean(dim=1),
        lambda x: torch.nn.functional.normalize(x, dim=1), lambda x: x[torch.arange(29)], lambda x: x.unsqueeze(1),
    ],
)  # fmt: skip
def test_9_control_work_on_single_examples_does_not_trip(harmless: Callable[[Tensor], Tensor]) -> None:
    with tripwire.watching():
        harmless(numbers(117, 5))


def standardised(rows: Tensor) -> Tensor:
    return (rows - rows.mean(dim=0)) / rows.std(dim=0)


@pytest.mark.parametrize("where", ["features", "whitener", "classes", "class weights", "learning rate"])
def test_9_control_a_stage_that_cheats_trips(
    copy: Copy, public_run: Path, watched_data: str, monkeypatch: Patch, where: str
) -> None:
    """The mistakes people make: standardise, whiten or count with the private split."""
    tripwire.install(monkeypatch)
    honest = probe.private_features

    def cheating(stage, *arguments, **options):
        rows, labels = honest(stage, *arguments, **options)
        if where == "features":
            rows = standardised(rows)
        elif where == "whitener":
            rows = whitening.fit(rows.clone(), 16)(rows)
        elif where == "classes":
            assert len(np.unique(stage.dataset.train().labels)) == 3
        elif where == "class weights":
            assert torch.bincount(labels).min() > 0
        return rows, labels

    def rate(*arguments: object) -> float:
        return float(cheating_rows.mean()) if where == "learning rate" else 1.0

    cheating_rows = numbers(117, 32)
    monkeypatch.setattr(probe, "private_features", cheating)
    monkeypatch.setattr(probe, "default_lr", rate)
    with tripwire.watching(), pytest.raises(tripwire.Tripped):
        run_probe(copy(public_run), watched_data)


def test_9_extraction_is_isolated(public_run: Path, wide_run: Path) -> None:
    """A feature row is a function of its own image (what the tripwire cannot see inside threads)."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8))
    for run in (public_run, wide_run):
        with context(run) as given:
            extractor, _ = load_extractor(given, "rgb")
        changed = images.clone()
        changed[4] = 0
        for mirror in (False, True):
            before, after = (extract(extractor, batch, mirror=mirror) for batch in (images, changed))
            same = [i for i in range(9) if i != 4]
            assert torch.allclose(before[same], after[same], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(before[4], after[4])


def test_9_the_whitener_does_not_know_the_data(copy: Copy, public_run: Path, tmp_path: Path) -> None:
    """Two data sets of the same declaration: the same bytes."""
    found = []
    for seed in (1, 2):
        run = copy(public_run)
        run_probe(run, write_blobs(tmp_path / "blobs.npz", seed=seed), steps=2)
        found.append({p.name: p.read_bytes() for p in (run / "3-probe/statistics").glob("whitener.*")})
        found[-1] |= {p.name: p.read_bytes() for p in (run / "2-pretrain").rglob("*") if p.is_file()}
    assert found[0] == found[1]
    assert "whitener.safetensors" in found[0]


# ------------------------------------------------------------------------------------------- 17: only releasable things

RESULT_KEYS = {
    "stage", "data", "title", "classes", "accuracy", "balanced_accuracy", "auc", "loss", "confusion",
    "majority_accuracy", "train_examples", "test_examples", "epsilon", "delta", "epsilon_target", "epsilon_total",
    "accountant", "noise_multiplier", "sample_rate", "steps", "charged_steps", "lost_steps", "clip_norm", "views",
    "expected_batch", "adjacency", "unit", "train_units", "tuned", "tuned_on",
    "noise", "random", "private", "device", "share", "lr",
    "momentum", "released", "mirror", "seconds", "refit", "source", "arch", "extractor_scale", "clipping",
    "trained_weights", "optimizer", "recipe", "init_sha256", "init_source",
    "extractor_colour",  # as the data declare their channels
    "precision", "attempt", "also_charged", "ledger_head",
}  # fmt: skip
REFIT_KEYS = {"noise_multiplier", "sample_rate", "steps", "lost_steps", "clip_norm", "lr", "momentum"}
CONFIG_KEYS = {"format", "arch", "extractor", "classes", "input", "precision", "result", "sha256"}
CHARGE_KEYS = {
    "kind", "stage", "attempt", "step", "steps", "planned", "noise_multiplier", "sample_rate", "clip_norm", "noise",
    "random", "time", "previous", "hash",
}  # fmt: skip
SEAL_KEYS = {"kind", "stage", "attempt", "digest", "time", "previous", "hash"}
PLAN_KEYS = {"format", "data", "epsilon", "delta", "examples", "adjacency", "unit", "stages"}


def test_17_model_holds_the_allow_list_and_nothing_else(probed_run: Path, tuned_run: Path) -> None:
    assert release.MODEL_FILES == ("model.safetensors", "config.json", "MODEL_CARD.md")
    for run in (probed_run, tuned_run):
        assert sorted(path.name for path in (run / "model").iterdir()) == sorted(release.MODEL_FILES)
        config = read_json(run / "model/config.json")
        assert set(config) == CONFIG_KEYS
        assert set(config["input"]) == {"size", "mirror", "shape"}
        assert set(config["result"]) <= RESULT_KEYS
        assert set(config["result"].get("refit") or {}) <= REFIT_KEYS
        assert config["extractor"]["arch"] == config["arch"] == "patchnet"


def test_17_logs_hold_norms_of_noisy_updates_and_nothing_else(tuned_run: Path) -> None:
    for folder, steps in (("3-probe", 8), ("4-finetune", 4), ("4-finetune/refit", 6)):
        lines = metrics_of(tuned_run / folder)
        assert [line["step"] for line in lines] == list(range(steps))
        assert all(set(line) == {"step", "update_norm", "weight_norm"} for line in lines)
    header, *charges = [json.loads(line) for line in (tuned_run / "privacy/ledger.jsonl").read_text().splitlines()]
    names = {"kind", "format", "data_unit", "adjacency", "examples", "budget", "created", "previous", "hash"}
    assert set(header) == names
    assert set(header["budget"]) == {"epsilon", "delta", "examples", "unit"}
    assert all(set(line) == (SEAL_KEYS if line["kind"] == "result" else CHARGE_KEYS) for line in charges)
    assert set(read_json(tuned_run / "privacy/plan.json")) == PLAN_KEYS


def test_17_the_logged_norm_is_that_of_the_noisy_update(
    copy: Copy, probed_run: Path, data: str, record: Record
) -> None:
    run = copy(probed_run)
    seen = record(run)
    run_finetune(run, data)
    for folder, name in (("4-finetune", "finetune"), ("4-finetune/refit", "finetune.head")):
        for line, made in zip(metrics_of(run / folder), seen.of(name), strict=True):
            joint = torch.cat([update.flatten() for update in made.released.values()])
            assert line["update_norm"] == pytest.approx(float(joint.norm()), rel=1e-4)


def needles(run: Path, indices: list[np.ndarray]) -> Iterator[tuple[str, bytes]]:
    """Bytes by which private values would give themselves away."""
    made = blobs()
    for image in made["x_train"]:
        yield "pixels", image[4].tobytes()
        yield "pixels, channels first", image.transpose(2, 0, 1)[0, 4].tobytes()
        yield "pixels as text", ", ".join(map(str, image[4, :4].flatten().tolist())).encode()
    labels = made["y_train"]
    for kind in (np.uint8, np.int32, np.int64):
        yield "labels", labels.astype(kind)[:32].tobytes()
    for text in (str(labels[:32].tolist()), "".join(map(str, labels[:32].tolist()))):
        yield "labels as text", text.encode()
    counts = np.bincount(labels[: len(labels) // 2])
    yield "class counts", str(counts.tolist()).encode()
    cached = np.load(run / "private/features.npy", allow_pickle=False)
    for row in cached[:40]:
        yield "features", row[:8].tobytes()
    for drawn in indices:
        if len(drawn) > 5:
            yield "indices", drawn.astype(np.int64)[:6].tobytes()
            yield "indices as text", str(drawn[:6].tolist()).strip("[]").encode()
    for digest in [read_json(path)["train"] for path in (run / "private").glob("inputs-*.json")]:
        yield "hash of the data", digest.encode()
        yield "hash of the data", bytes.fromhex(digest)


def leaks(run: Path, indices: list[np.ndarray]) -> list[str]:
    public = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and "private" not in path.relative_to(run).parts
    }
    return [f"{name} in {path}" for name, needle in needles(run, indices) for path in public if needle in public[path]]


def test_17_nothing_private_lies_outside_private(copy: Copy, public_run: Path, data: str, record: Record) -> None:
    run = copy(public_run)
    seen = record(run)
    run_probe(run, data)
    run_finetune(run, data)
    drawn = [indices for _, rate, indices in seen.draws if rate < 1]
    assert len(drawn) == 4
    assert leaks(run, drawn) == []
    # the file that holds them is found when it lies elsewhere
    sample = blobs()
    for place, content in (
        ("3-probe/cache.npy", (run / "private/features.npy").read_bytes()),
        ("3-probe/metrics.jsonl", json.dumps({"indices": drawn[0].tolist()}).encode()),
        ("model/preview.bin", sample["x_train"][3].tobytes()),
        ("4-finetune/labels.bin", sample["y_train"].tobytes()),
        ("run.json.old", (run / "private/inputs-probe.json").read_bytes()),
    ):
        before = (run / place).read_bytes() if (run / place).exists() else None
        (run / place).write_bytes(content)
        assert leaks(run, drawn) != [], place
        (run / place).unlink() if before is None else (run / place).write_bytes(before)


def test_17_private_is_closed_to_others(tuned_run: Path, copy: Copy, data: str, public_run: Path) -> None:
    assert stat.S_IMODE((tuned_run / "private").stat().st_mode) == 0o700
    open_to_all = copy(public_run)
    (open_to_all / "private").mkdir(mode=0o777)
    (open_to_all / "private").chmod(0o777)
    run_probe(open_to_all, data, steps=2)
    assert stat.S_IMODE((open_to_all / "private").stat().st_mode) == 0o700


def test_17_the_test_split_is_read_once_at_the_end(
    copy: Copy, public_run: Path, tmp_path: Path, data: str, record: Record
) -> None:
    run = copy(public_run)
    seen = record(run)
    run_probe(run, data)
    assert seen.tests == [(8, 8)]
    run_finetune(run, data)
    assert seen.tests == [(8, 8), (18, 18)]
    run_probe(run, data)  # finished: nothing is read again
    assert len(seen.tests) == 2
    seen.run = tmp_path / "scratch"
    run_scratch(tmp_path / "scratch", data)
    assert seen.tests[2:] == [(21, 3)]


def test_17_the_test_split_decides_nothing(copy: Copy, public_run: Path, tmp_path: Path) -> None:
    """Other test images, same everything else: the same weights."""
    heads = []
    for seed in (0, 1):
        made = blobs(0)
        other = blobs(seed + 10)
        made |= {"x_test": other["x_test"], "y_test": other["y_test"]}
        np.savez(tmp_path / "blobs.npz", **made)
        run = copy(public_run)
        result = run_probe(run, f"npz:{tmp_path / 'blobs.npz'}", {"insecure_seed": 1})
        assert sum(map(sum, result["confusion"])) == TEST
        run_finetune(run, f"npz:{tmp_path / 'blobs.npz'}", {"insecure_seed": 1})
        heads.append((run / "model/model.safetensors").read_bytes())
    assert heads[0] == heads[1]


def test_17_the_feature_cache_is_of_these_data_and_this_extractor(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    """The cache is used when nothing changed, and never when the extractor did (as it has in the refit)."""
    run, computed = copy(public_run), []
    honest = {name: getattr(features_module, name) for name in ("extract_by_ranks", "features_of_blocks")}
    for name in honest:

        def counted(*arguments, name=name):
            computed.append(1)
            return honest[name](*arguments)

        monkeypatch.setattr(features_module, name, counted)
    run_probe(run, data)
    run_probe(run, data, {"overwrite": True})
    assert len(computed) == 2  # of the training and of the test split, once
    probed = np.load(run / "private/features.npy", allow_pickle=False)
    run_finetune(run, data)
    assert len(computed) == 4
    assert not np.allclose(probed, np.load(run / "private/features.npy", allow_pickle=False))


def test_21_a_bug_inside_a_stage_is_not_swallowed_and_pays(
    copy: Copy, public_run: Path, data: str, monkeypatch: Patch
) -> None:
    """An exception in the middle leaves the charged steps charged."""
    run = copy(public_run)
    draw, count = PoissonSampler.draw, iter(range(100))

    def failing(sampler: PoissonSampler) -> np.ndarray:
        if next(count) == 3:
            raise RuntimeError("broken")
        return draw(sampler)

    monkeypatch.setattr(PoissonSampler, "draw", failing)
    with pytest.raises(RuntimeError, match="broken"):
        run_probe(run, data, steps=16)
    assert ledger_of(run).charged_steps("probe", 1) == 4
    monkeypatch.setattr(PoissonSampler, "draw", draw)
    result = run_probe(run, data, steps=16)
    assert (result["charged_steps"], result["lost_steps"]) == (16, 2)  # checkpoints are every second step
    assert result["epsilon"] <= 1.2


def test_boundaries_that_these_tests_rely_on() -> None:
    """The recorder and the tripwire replace these names; if a stage stopped using them, the tests would see nothing."""
    assert features_module.private_features is probe.private_features is finetune.private_features
    assert isinstance(RunDir.private_dir, property)
    assert callable(datasets.Dataset.train)
