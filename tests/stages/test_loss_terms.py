"""The loss terms against a Hessian that is computed whole, and their formula against simulated noisy steps."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from dprandp.continual import switching
from dprandp.continual.switching import LossTerms, loss_terms, mean_clip_factor

WIDTH, CLASSES, EXAMPLES = 3, 2, 6


def loss_of_each(parameters: dict, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A small network with one vector of six weights, so that all its sign patterns can be tried."""
    weights = parameters["w"].view(WIDTH, CLASSES)
    return functional.cross_entropy(torch.tanh(images @ weights) * 2, labels, reduction="none")


@pytest.fixture
def problem() -> tuple[dict, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    parameters = {"w": torch.randn(WIDTH * CLASSES, generator=generator, dtype=torch.float64)}
    images = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return parameters, images, torch.tensor([0, 1, 1, 0, 1, 0])


def exact(parameters: dict, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Everything from the whole Hessian and every single gradient."""

    def mean(w: torch.Tensor) -> torch.Tensor:
        return loss_of_each({"w": w}, images, labels).mean()

    hessian = torch.autograd.functional.hessian(mean, parameters["w"])
    singles = torch.stack([
        torch.autograd.functional.jacobian(
            lambda w, i=i: loss_of_each({"w": w}, images[i : i + 1], labels[i : i + 1])[0], parameters["w"]
        )
        for i in range(len(labels))
    ])  # fmt: skip
    gradient = singles.mean(dim=0)
    covariance = torch.cov(singles.T)
    return {
        "gradient_squared": float(gradient @ gradient),
        "along_gradient": float(gradient @ hessian @ gradient),
        "trace": float(hessian.trace()),
        "trace_covariance": float((hessian @ covariance).trace()),
        "clip_factor": float((1 / (singles.norm(dim=1) + 0.01)).mean()),
    }


def test_terms_are_those_of_the_whole_hessian(problem: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every sign pattern tried once, Hutchinson's mean is the trace itself."""
    patterns = itertools.cycle(itertools.product((-1.0, 1.0), repeat=6))
    monkeypatch.setattr(switching, "_signs", lambda count, generator: torch.tensor(next(patterns)))
    found = loss_terms(
        loss_of_each, *problem, noise_multiplier=2.0, batch=32.0, probes=64, generator=torch.Generator()
    )
    for name, value in exact(*problem).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert abs(found.trace_covariance - found.trace) > 1e-3  # not the same number twice


def test_random_probes_are_right_on_average(problem: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    found = loss_terms(loss_of_each, *problem, noise_multiplier=1.0, batch=8.0, probes=500, generator=generator)
    expected = exact(*problem)
    assert found.trace == pytest.approx(expected["trace"], rel=0.15)
    assert found.trace_covariance == pytest.approx(expected["trace_covariance"], rel=0.2)


def test_a_linear_loss_has_no_curvature() -> None:
    images, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    found = loss_terms(
        lambda parameters, x, y: x @ parameters["w"], {"w": torch.ones(3)}, images, labels,
        noise_multiplier=1.0, batch=8.0, probes=2, generator=torch.Generator(),
    )  # fmt: skip
    assert (found.trace, found.along_gradient, found.trace_covariance) == (0, 0, 0)
    assert math.isnan(found.improvement)
    assert math.isnan(found.slowdown)


def test_clip_factors_do_not_depend_on_the_microbatch(problem: tuple) -> None:
    one, many = (mean_clip_factor(loss_of_each, *problem, microbatch=size) for size in (1, 6))
    assert one == pytest.approx(many, rel=1e-5)


# ------------------------------------------------------------------------------------------ the formula, by simulation

HESSIAN = np.diag([0.4, 1.0, 3.0])
POINT = np.array([2.0, -1.0, 0.5])
SPREAD = np.diag([0.5, 0.2, 1.0])  # covariance of the gradients of single examples
FACTOR, NOISE, BATCH = 0.7, 3.0, 6


def quadratic(batch: float = BATCH) -> LossTerms:
    gradient = HESSIAN @ POINT
    return LossTerms(
        gradient_squared=gradient @ gradient, along_gradient=gradient @ HESSIAN @ gradient, trace=np.trace(HESSIAN),
        trace_covariance=np.trace(HESSIAN @ SPREAD), clip_factor=FACTOR, noise_multiplier=NOISE, batch=batch,
    )  # fmt: skip


def simulated(length: float, *, noise: float = NOISE, batch: int = BATCH, trials: int = 40_000) -> tuple[float, float]:
    """Mean fall of ½θᵀHθ in one private step of a given length, and its standard error.

    A private step is as the package takes it: sum of c g_i, noise of std σ, over B; c is then undone by the length.
    """
    random = np.random.default_rng(1)
    gradient = HESSIAN @ POINT
    total = batch * FACTOR * gradient + FACTOR * math.sqrt(batch) * random.normal(size=(trials, 3)) @ np.sqrt(SPREAD)
    step = (total + noise * random.normal(size=(trials, 3))) / batch
    after = POINT - length / FACTOR * step
    falls = 0.5 * POINT @ HESSIAN @ POINT - 0.5 * np.einsum("ti,ij,tj->t", after, HESSIAN, after)
    return float(falls.mean()), float(falls.std() / math.sqrt(trials))


def test_the_improvement_is_that_of_simulated_steps_of_the_best_length() -> None:
    terms = quadratic()
    best = terms.gradient_squared / (terms.along_gradient + terms.sampling + terms.decelerator)
    mean, error = simulated(best)
    assert abs(mean - terms.improvement) < 4 * error
    for other in (0.7 * best, 1.4 * best):
        assert simulated(other)[0] < mean - 4 * error
    without, _ = simulated(best, noise=1.5 * NOISE)  # the control: other noise is seen
    assert abs(without - terms.improvement) > 4 * error


def test_the_slowdown_is_what_privacy_takes_and_at_the_best_batch_it_is_the_curvature() -> None:
    terms = quadratic()
    free = dataclasses.replace(terms, noise_multiplier=0.0)
    assert free.decelerator == 0
    assert terms.improvement == pytest.approx(free.improvement / (1 + terms.slowdown))
    at_best = quadratic(quadratic().best_batch)
    assert at_best.decelerator == pytest.approx(at_best.along_gradient)
    assert at_best.to_dict()["best_batch"] == at_best.best_batch
    assert math.isnan(dataclasses.replace(at_best, along_gradient=-1.0).best_batch)
