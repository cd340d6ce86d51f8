"""Extractors that see more than 32 pixels a side: what is decoded, learned, released and said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import (
    CONTINUE,
    DEEP,
    PRETRAIN,
    PROBE,
    context,
    read_json,
    run_continue,
    run_finetune,
    run_probe,
    run_scratch,
)

from dprandp import generate, pretrain, tune
from dprandp.config import schema
from dprandp.config.declared import Publication
from dprandp.errors import CheckpointError, UsageError
from dprandp.pipeline import stage_line
from dprandp.release import load_model
from dprandp.release.graph import graph_of, resizing
from dprandp.runs.directory import RunDir
from dprandp.runs.results import ProbeResult
from dprandp.tune import TuneConfig
from dprandp.vision.images import resize

IMAGES = {"process": "dead-leaves", "count": 60, "resolution": 64}
ARCHITECTURES = {
    "patchnet": PRETRAIN,
    "two layers": PRETRAIN | DEEP,
    "wrn": {"arch": "wrn-10-1", "steps": 2, "batch_size": 4},
    "vit": {"arch": "vit-1-16-8", "steps": 2, "batch_size": 4},
}


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 64, 64, 3], of even brightness or with stripes of a pixel, which no 32-pixel image shows."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = random.integers(90, 130, (count, 1, 1, 3)) + random.integers(-10, 10, (count, 64, 64, 1))
    images[labels == 1, :, ::2] += 40
    images[labels == 1, :, 1::2] -= 40
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of such images."""
    root = tmp_path_factory.mktemp("fine")
    for seed, (split, count) in enumerate({"train": 80, "test": 40}.items()):
        for number, (image, label) in enumerate(zip(*stripes(count, seed), strict=True)):
            path = root / split / ("even", "striped")[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return f"folder:{root}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "run"
    with context(path) as given:
        generate.run(schema.build("generate", IMAGES), given)
    return path


def learn(run: Path, size: int | None, **settings: object) -> None:
    with context(run) as given:
        pretrain.run(schema.build("pretrain", settings | ({"input_size": size} if size else {})), given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_larger_input_shows_what_a_smaller_one_cannot(copy, images: Path, fine: str, name: str) -> None:
    accuracy = {}
    for size in (None, 64):
        run = copy(images)
        learn(run, size, **ARCHITECTURES[name])
        result = run_probe(run, fine, epsilon=200.0, share=1.0, mirror=False)
        accuracy[size] = result["accuracy"]
        side = size or 32
        assert result["input_size"] == side
        assert np.load(run / "private/images-train.npy", mmap_mode="r")["pixels"].shape == (80, side, side, 3)
        model = load_model(run / "model")
        assert model.shape == (side, side, 3)
        assert read_json(run / "model/config.json")["input"]["size"] == side
        assert f"resized to {side} × {side} pixels (bilinear" in (run / "model/MODEL_CARD.md").read_text("utf-8")
        said = stage_line("probe", RunDir.open(run, create=False).result(ProbeResult))
        assert f"images seen at {side} × {side} pixels" in said
        files = sorted(Path(fine.removeprefix("folder:")).glob("test/*/*.png"))
        right = [row["class"] == path.parent.name for row, path in zip(model.predict(files), files, strict=True)]
        assert np.mean(right) == pytest.approx(result["accuracy"])
    assert accuracy[64] > 0.9, accuracy
    assert accuracy[None] < 0.75, accuracy


@pytest.mark.slow
def test_all_stages_of_a_network_for_larger_images(copy, images: Path, data: str) -> None:
    """An npz set of 16-pixel images: every stage enlarges them itself."""
    run = copy(images)
    learn(run, 48, **ARCHITECTURES["wrn"])
    assert run_continue(run, data, share=0.3, steps=4, switch="2", public="synth")["input_size"] == 48
    epsilon = {"epsilon": CONTINUE["epsilon"]}
    with context(run) as given:
        tune.run(schema.build("probe", PROBE | epsilon | {"data": data}), TuneConfig(trials=2), given)
    assert run_probe(run, data, share=0.4, **epsilon)["input_size"] == 48
    assert run_finetune(run, data, **epsilon, steps=2)["input_size"] == 48
    assert load_model(run / "model").network.extractor.input_size == 48


@pytest.mark.slow
def test_a_network_from_scratch(tmp_path: Path, fine: str) -> None:
    result = run_scratch(tmp_path / "run", fine, input_size=48, steps=1)
    assert result["input_size"] == 48
    model = load_model(tmp_path / "run/model")
    assert (model.shape, model.network.extractor.input_size) == ((48, 48, 3), 48)
    exported, apart, _ = graph_of(model, "torch-export", Publication())
    assert (len(exported) > 1000, apart < 1e-5) == (True, True)


def test_an_input_larger_than_the_synthetic_images_is_refused(copy, images: Path) -> None:
    with pytest.raises(UsageError, match=r"64 pixels a side, fewer than the 96") as caught:
        learn(copy(images), 96, **PRETRAIN)
    assert "--resolution 256" in caught.value.fix


def test_a_model_whose_two_statements_of_size_differ_is_refused(copy, images: Path, data: str) -> None:
    run = copy(images)
    learn(run, 48, **PRETRAIN)
    run_probe(run, data)
    path = run / "model/config.json"
    path.write_text(path.read_text("utf-8").replace('"size": 48', '"size": 32'), "utf-8")
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_model(run / "model")


@pytest.mark.parametrize("size", [32, 64])
def test_the_matrix_of_a_graph_resizes_as_the_stages_do(size: int) -> None:
    image = torch.randint(0, 256, (1, 3, 90, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = resizing(90, size) @ (image.float() @ resizing(50, size).t())
    assert (made.round().clamp(0, 255) - resize(image, size, size).float()).abs().max() <= 1
