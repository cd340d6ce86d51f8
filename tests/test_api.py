"""The Python API: what a notebook uses."""

from __future__ import annotations

import doctest
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dprandp
from dprandp import api
from dprandp.config.schema import GenerateConfig
from dprandp.errors import BudgetError, InputError, StorageError, UsageError
from dprandp.generate import blocks_of
from dprandp.privacy.ledger import Ledger
from dprandp.synth import render_block


def test_the_examples_in_the_docstrings_hold() -> None:
    outcome = doctest.testmod(api, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0
    assert outcome.attempted >= 4


def test_the_package_has_these_names_and_loads_no_torch_for_its_version() -> None:
    assert all(callable(getattr(dprandp, name)) for name in dprandp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dprandp.nothing  # noqa: B018
    script = "import sys, dprandp; dprandp.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------- images


def test_images_are_those_of_generate() -> None:
    """Blocks as ``generate`` makes them; a count that ends within a block."""
    config = GenerateConfig(process="dead-leaves", count=130, resolution=8, seed=3)
    blocks = [render_block("dead-leaves", 3, block, count, 8) for block, count in blocks_of(config).items()]
    made = dprandp.random_images("dead-leaves", count=130, resolution=8, seed=3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, np.concatenate(blocks))
    assert not np.array_equal(made, dprandp.random_images("dead-leaves", count=130, resolution=8, seed=4))


def test_a_dataset_has_the_same_images_in_any_order() -> None:
    made = dprandp.random_images("dead-leaves", count=130, resolution=8)
    images = dprandp.RandomImages("dead-leaves", count=130, resolution=8, transform=lambda image: image.float() / 255)
    assert len(images) == 130
    for index in (129, 0, 99, 100, -1):
        assert torch.equal(images[index], torch.from_numpy(made[index]).permute(2, 0, 1).float() / 255)
    with pytest.raises(IndexError):
        images[130]
    loader = torch.utils.data.DataLoader(images, batch_size=64)
    assert [len(batch) for batch in loader] == [64, 64, 2]
    for wrong in ({"count": 0}, {"count": 5, "resolution": 33}, {"process": "dead-leafs", "count": 5}):
        with pytest.raises(UsageError):
            dprandp.random_images(**wrong)


# ------------------------------------------------------------------------------------------------------------- budget


def test_noise_and_budget_are_inverse() -> None:
    sigma = dprandp.noise_multiplier(2.0, 1e-5, steps=50)
    assert 1.98 < dprandp.epsilon(sigma, 1e-5, steps=50) <= 2.0
    sampled = dprandp.noise_multiplier(2.0, 1e-5, steps=50, sample_rate=0.1)
    assert sampled < sigma / 4
    assert 1.98 < dprandp.epsilon(sampled, 1e-5, steps=50, sample_rate=0.1) <= 2.0


# --------------------------------------------------------------------------------------------------------------- head


def blobs(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around three axes, rows of any length."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    features = np.eye(8)[labels] + 0.2 * random.normal(size=(count, 8))
    return features * random.uniform(0.5, 20, (count, 1)), labels


def test_without_noise_the_head_is_that_of_plain_gradient_descent(tmp_path: Path) -> None:
    """An oracle by autograd, in which every example's gradient is clipped by itself."""
    features, labels = blobs(40)
    made = dprandp.fit_private_head(
        features, labels, classes=3, epsilon=math.inf, ledger=tmp_path / "l", steps=6, lr=0.7, clip_norm=0.6
    )
    rows = torch.nn.functional.normalize(torch.from_numpy(features).float(), dim=1)
    head, velocity, kept = torch.zeros(8, 3), torch.zeros(8, 3), []
    for _ in range(6):
        total = torch.zeros(8, 3)
        for row, label in zip(rows, labels, strict=True):
            weights = head.clone().requires_grad_()
            torch.nn.functional.cross_entropy(row[None] @ weights, torch.tensor([label])).backward()
            total += weights.grad * min(1.0, 0.6 / float(weights.grad.norm()))
        velocity = 0.9 * velocity + total / 40
        head = head - 0.7 * velocity
        kept.append(head)
    assert torch.allclose(made.weights, torch.stack(kept[3:]).mean(0), atol=1e-5)
    assert made.epsilon == math.inf


def test_the_noise_is_that_of_the_plan(tmp_path: Path) -> None:
    """Rows of zeros have no gradient, so one step leaves noise alone: its standard deviation is lr σ C / N."""
    made = dprandp.fit_private_head(
        np.zeros((50, 400)), [0] * 50, classes=10, epsilon=1.0, ledger=tmp_path / "l", steps=1, lr=2.0, clip_norm=0.5
    )
    expected = 2.0 * made.noise_multiplier * 0.5 / 50
    assert abs(float(made.weights.std()) / expected - 1) < 0.06  # 4,000 numbers: five standard deviations
    assert not abs(float(made.weights.std()) / (expected / 2) - 1) < 0.06  # the control: half the noise
    assert made.noise_multiplier == dprandp.noise_multiplier(1.0, made.delta, steps=1)


@pytest.mark.parametrize("change", ["older copy", "removed", "longer", None])
def test_a_ledger_that_is_exchanged_during_a_fit_gives_no_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    """Its charge would be in no file, and the next head would have a budget that is spent. The control: no change."""
    features, labels = blobs(30)
    ledger, copy = tmp_path / "ledger", tmp_path / "copy"
    given = {"features": features, "labels": labels, "classes": 3, "epsilon": 1.0, "ledger": ledger, "steps": 3}
    dprandp.fit_private_head(**given, share=0.3)
    shutil.copy(ledger, copy)
    real = api.update_head

    def update(*arguments: object) -> None:
        if change == "older copy" and copy.exists():
            copy.replace(ledger)
        elif change == "removed":
            ledger.unlink(missing_ok=True)
        elif change == "longer":
            ledger.write_bytes(ledger.read_bytes() + b"{}\n")
        real(*arguments)

    monkeypatch.setattr("dprandp.api.update_head", update)
    if change is None:
        assert dprandp.fit_private_head(**given).epsilon <= 1
    else:
        with pytest.raises(StorageError, match="privacy ledger"):
            dprandp.fit_private_head(**given)


def test_heads_of_one_ledger_share_its_budget(tmp_path: Path) -> None:
    features, labels = blobs()
    ledger = tmp_path / "ledger.jsonl"
    given = {"features": features, "labels": labels, "classes": 3, "epsilon": 1.5, "ledger": ledger}
    first = dprandp.fit_private_head(**given, share=2 / 3)
    assert 0.99 < first.epsilon <= 1.0
    assert float((first.predict(features) == torch.from_numpy(labels)).float().mean()) > 0.9
    second = dprandp.fit_private_head(**given)
    assert 1.0 < second.epsilon <= 1.5
    with pytest.raises(BudgetError, match="uses up"):
        dprandp.fit_private_head(**given)
    alone = dprandp.fit_private_head(features, labels, classes=3, epsilon=1.5, ledger=tmp_path / "other")
    assert second.noise_multiplier > alone.noise_multiplier
    kept = Ledger.open(ledger, read_only=True)
    assert [charge.steps for charge in kept.charges] == [120, 120]
    assert kept.spent(second.delta).upper == second.epsilon
    few = {"features": features[:30], "labels": labels[:30]}
    for change in ({"epsilon": 3.0}, {"delta": 1e-6}, {"epsilon": math.inf}, few):  # chosen after a head was seen
        with pytest.raises(BudgetError, match="was begun with"):
            dprandp.fit_private_head(**given | change)
    assert ledger.read_bytes().count(b"\n") == 3


def test_a_head_is_never_charged_to_the_ledger_of_something_else(tmp_path: Path) -> None:
    """Of a run, or of an audit, which has no budget."""
    for number, budget in enumerate((None, {"epsilon": 1.0, "delta": 1e-5, "examples": 9, "unit": "one image"})):
        ledger = Ledger.create(tmp_path / str(number), 9, budget=budget)
        with pytest.raises(BudgetError, match="was begun with"):
            dprandp.fit_private_head(
                np.ones((9, 2)), [0] * 9, classes=2, epsilon=1.0, delta=1e-5, ledger=tmp_path / str(number)
            )
        assert not Ledger.open(ledger.path).charges


def test_rows_that_are_not_finite_count_as_zeros(tmp_path: Path) -> None:
    features, labels = blobs(60)
    features[0], features[1, 3] = np.nan, np.inf
    made = dprandp.fit_private_head(features, labels, classes=3, epsilon=8.0, ledger=tmp_path / "l")
    assert made.weights.isfinite().all()
    assert torch.equal(made.scores(features)[:2], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"features": np.zeros(9)}, UsageError, "the shape"),
        ({"features": np.zeros((0, 8)), "labels": []}, UsageError, "do not fit"),
        ({"features": np.zeros((9, 0))}, UsageError, "do not fit"),
        ({"features": torch.zeros(9, 8).to_sparse()}, UsageError, "dense"),
        ({"features": np.full((9, 8), "x")}, UsageError, "dense"),
        ({"labels": ["a"] * 9}, UsageError, "do not fit"),
        ({"labels": np.full(9, 2**64 - 1, np.uint64)}, InputError, "outside"),
        ({"labels": [0, 1]}, UsageError, "do not fit"),
        ({"labels": [0.5] * 9}, UsageError, "do not fit"),
        ({"labels": [3] * 9}, InputError, "outside"),
        ({"classes": 1}, UsageError, "at least 2"),
        ({"classes": 2.5}, UsageError, "whole"),
        ({"epsilon": "1"}, UsageError, "epsilon"),
        ({"share": 1.5}, UsageError, "share"),
        ({"lr": math.nan}, UsageError, "lr"),
        ({"lr": math.inf}, UsageError, "lr"),
        ({"momentum": 1.0}, UsageError, "momentum"),
        ({"momentum": math.nan}, UsageError, "momentum"),
        ({"epsilon": 0.0}, UsageError, "epsilon"),
        ({"delta": 0.5}, UsageError, "delta"),
        ({"steps": 0}, UsageError, "step"),
        ({"clip_norm": 0.0}, UsageError, "clip_norm"),
        ({"clip_norm": True}, UsageError, "clip_norm"),
        ({"epsilon": True}, UsageError, "epsilon"),
        ({"ledger": None}, UsageError, "ledger"),
    ],
)
def test_what_a_head_refuses(tmp_path: Path, change: dict, error: type[Exception], said: str) -> None:
    given = {"features": np.ones((9, 8)), "labels": [0] * 9, "classes": 3, "epsilon": 1.0, "ledger": tmp_path / "l"}
    with pytest.raises(error) as caught:
        dprandp.fit_private_head(**given | change)
    assert said in str(caught.value)
    assert not (tmp_path / "l").exists()  # nothing was begun, let alone charged


# --------------------------------------------------------------------------------------------------------- run, models


def test_a_run_and_its_model(tmp_path: Path) -> None:
    small = {
        "generate": {"process": "perlin", "count": 60, "resolution": 32},
        "pretrain": {"filters": 20, "layers": 1, "dictionary_patches": 2000, "dictionary_iterations": 2},
        "probe": {"dims": 32, "statistics_images": 40, "steps": 10},
    }
    result = dprandp.run("digits", epsilon=4.0, directory=tmp_path / "run", share=1.0, **small)
    assert 0 < result["epsilon"] <= 4.0
    assert Path(result["report"]).exists()
    assert dprandp.run("digits", epsilon=4.0, directory=tmp_path / "run", share=1.0, **small) == result  # finished
    with pytest.raises(UsageError, match="no stage 'prob'"):
        dprandp.run("digits", directory=tmp_path / "run", prob={"steps": 3})
    with pytest.raises(UsageError, match="'epsilon'"):  # which of the two would count?
        dprandp.run("digits", epsilon=1.0, directory=tmp_path / "other", **(small | {"probe": {"epsilon": 8.0}}))
    assert not (tmp_path / "other").exists()
    image = np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    for path in (tmp_path / "run", tmp_path / "run/model"):
        model = dprandp.load_model(path)
        [row] = model.predict(image)
        assert row["class"] in model.classes
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        both = [each["probabilities"] for each in model.predict(np.stack([image, image]))]
        assert both == [pytest.approx(row["probabilities"], abs=1e-6)] * 2
    from PIL import Image

    Image.fromarray(image).save(tmp_path / "scan.png")
    read = model.predict(tmp_path / "scan.png")[0]["probabilities"]
    assert read == pytest.approx(row["probabilities"], abs=1e-6)
    with pytest.raises(InputError, match="holds no images"):
        model.predict(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(InputError):
        dprandp.load_model(tmp_path)
