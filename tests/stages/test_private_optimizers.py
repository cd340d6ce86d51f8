"""Steps against the published formulas, alone and in whole fine-tunes; their states go on to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Copy, Record, Stopped, run_finetune, stop_at
from torch import Tensor

from dprandp.dpsgd.clipped_sums import ClippedSums
from dprandp.models.optimizers import Optimizer, OptimizerSettings, restore
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import tensors_from_bytes, tensors_to_bytes

SHAPES = {"extractor.filters": (6, 3, 2, 2), "extractor.bias": (6,), "head": (6, 3)}
SETTINGS = {
    "sgd": OptimizerSettings("sgd"),
    "momentum": OptimizerSettings("sgd", momentum=0.8),
    "adam": OptimizerSettings("adam"),
    "adamw": OptimizerSettings("adam", momentum=0.7, weight_decay=0.1),
}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def by_formula(settings: OptimizerSettings, value: Tensor, gradients: list[Tensor | None], lr: float) -> Tensor:
    """De et al. 2022 for SGD; Kingma & Ba 2015 with Loshchilov & Hutter 2019's decay; in float64."""
    value, first, second = value.double(), torch.zeros_like(value).double(), torch.zeros_like(value).double()
    beta = settings.beta
    for count, gradient in enumerate(gradients, start=1):
        if gradient is None:
            continue
        gradient = gradient.double()
        if settings.kind == "sgd":
            first = beta * first + gradient
            value = value - lr * first
            continue
        first = beta * first + (1 - beta) * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        root = (second / (1 - 0.999**count)).sqrt() + 1e-8
        value = value - lr * settings.weight_decay * value - lr * first / (1 - beta**count) / root
    return value


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_the_published_ones(name):
    """Also where a parameter has no gradient in some steps: it stays, and Adam's count goes on."""
    parameters, start = draw(0), draw(0)
    optimizer = Optimizer(SETTINGS[name], parameters)
    given = [draw(step + 1) for step in range(5)]
    for step, gradients in enumerate(given):
        before = parameters["head"].clone()
        if step in (1, 2):
            del gradients["head"]
        optimizer.step(gradients, 0.1)
        assert torch.equal(before, parameters["head"]) == (step in (1, 2))
    for each, value in start.items():
        expected = by_formula(SETTINGS[name], value, [gradients.get(each) for gradients in given], 0.1)
        assert torch.allclose(parameters[each].double(), expected, rtol=1e-5, atol=1e-6), each


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_state_goes_on_to_the_bit(name):
    through, parameters = draw(0), draw(0)
    whole, optimizer = Optimizer(SETTINGS[name], through), Optimizer(SETTINGS[name], parameters)
    shapes = {each: value.shape for each, value in optimizer.state.items()}
    assert all(each.startswith("optimizer.") for each in shapes)
    for step in range(6):
        whole.step(draw(step + 1), 0.1)
        if step == 3:
            saved = tensors_from_bytes(tensors_to_bytes(optimizer.state | {"parameters.x": torch.ones(2)}), "x")
            optimizer = Optimizer(SETTINGS[name], parameters)
            assert {each: value.shape for each, value in optimizer.state.items()} == shapes
            restore(optimizer.state, saved)
        optimizer.step(draw(step + 1), 0.1)
    assert all(torch.equal(parameters[each], value) for each, value in through.items())
    if name != "sgd":  # a state that is not loaded is noticed
        Optimizer(SETTINGS[name], parameters).step(draw(7), 0.1)
        whole.step(draw(7), 0.1)
        assert not torch.equal(parameters["head"], through["head"])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_what_is_masked_stays_also_when_other_weights_are_chosen(kind):
    """In steps that move a weight, momentum is made, and decay pulls at it: neither moves it in the others."""
    settings = OptimizerSettings(kind, momentum=0.9, weight_decay=0.1)
    parameters, whole = draw(0), draw(0)
    optimizer, free = Optimizer(settings, parameters), Optimizer(settings, whole)
    places = torch.arange(72).view(6, 3, 2, 2)
    for step in range(6):
        mask = {"extractor.filters": places % 3 == step % 3}
        before = {name: value.clone() for name, value in parameters.items()}
        optimizer.step(draw(step + 1), 0.1, mask)
        free.step(draw(step + 1), 0.1)
        moved = parameters["extractor.filters"] != before["extractor.filters"]
        assert torch.equal(moved, mask["extractor.filters"])
    assert torch.equal(parameters["head"], whole["head"])


def test_what_is_disclosed_names_all_of_it():
    words = OptimizerSettings("adam", weight_decay=0.1).in_words()
    assert words == "AdamW on the noisy gradients, momentum 0.9, weight decay 0.1"


# ---------------------------------------------------------------------------------------------------- whole fine-tunes

INGREDIENTS = [
    ({"optimizer": "adam", "lr": 0.01}, "Adam on the noisy gradients"),
    ({"views": 2}, "2, their gradients averaged before the clip"),
    ({"clipping": "rescaled", "clip_norm": 0.25}, "sum and noise are then divided by C"),
]


@pytest.mark.parametrize(("settings", "said"), INGREDIENTS, ids=["adam", "views", "rescaled"])
def test_9_the_parameters_are_a_function_of_the_noisy_updates(
    copy: Copy, probed_run: Path, data: str, record: Record, monkeypatch: pytest.MonkeyPatch, settings: dict, said: str
) -> None:
    """So are the points at which gradients are taken; and the card says how it was done."""
    run, points, of = copy(probed_run), [], ClippedSums.of

    def recorded(self, parameters, *more):
        points.append({each: value.clone() for each, value in parameters.items()})
        return of(self, parameters, *more)

    monkeypatch.setattr(ClippedSums, "of", recorded)
    before = load_file(run / "model/model.safetensors")
    seen = record(run)
    result = run_finetune(run, data, refit_steps=0, extractor_scale=1.0, ema=0.0, **settings)
    names = sorted(seen.releases[0].released)
    parameters = {each: before[each].clone() for each in names}
    optimizer = Optimizer(OptimizerSettings(settings.get("optimizer", "sgd"), settings.get("momentum")), parameters)
    for release, point in zip(seen.of("finetune"), points, strict=True):
        assert all(torch.allclose(point[each], parameters[each], atol=1e-5) for each in names)
        noisy = {each: release.released[each] / settings.get("clip_norm", 1.0) for each in names}
        optimizer.step(noisy, result["lr"])
    stored = load_file(run / "4-finetune/model.safetensors")
    for each in names:
        assert torch.allclose(stored[each], parameters[each], rtol=1e-4, atol=1e-5), each
        assert not torch.allclose(stored[each], before[each], atol=1e-5)
    assert said in (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")


def test_11_a_stopped_run_goes_on_with_the_state_it_had(
    copy: Copy, probed_run: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(probed_run)
    settings = {"optimizer": "adam", "lr": 0.01, "refit_steps": 0, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run_finetune(run, data, **settings)
    saved = checkpoint.load(run / "4-finetune").tensors
    began, step = [], Optimizer.step

    def spied(self, *given):
        began.append({each: value.clone() for each, value in self.state.items()})
        step(self, *given)

    monkeypatch.setattr(Optimizer, "step", spied)
    run_finetune(run, data, **settings)
    assert began[0].keys() == {each for each in saved if each.startswith("optimizer.")}
    for key, value in began[0].items():
        assert value.any(), key
        assert torch.equal(value, saved[key]), key
