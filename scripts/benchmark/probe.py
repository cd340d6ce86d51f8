"""Phase II: a full-batch step of the head, clipped, noisy and applied, against Opacus and jax-privacy.

One step is timed (a probe makes about a hundred equal ones). The peers cannot hold the per-sample gradients of 50,000
rows at once (8 GB), so they take them in parts, as Opacus' own memory manager would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.cases import OURS, Case, Comparison, Limit, MemoryComparison, PeerMissing, Side
from benchmark.pairs import agree
from benchmark.peer_jax import JAX, JaxStep, as_array, linear_loss
from benchmark.peer_opacus import GHOST, HOOKS, DpSgd, OpacusStep
from benchmark.timing import Work
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.mechanism import PrivatePlan, PrivateStep
from dprandp.privacy.randomness import SystemRandom
from dprandp.probe.head import HeadSettings, begin_head, update_head

CLASSES = 10
CLIP_NORM = 0.5  # below the gradient of a unit row under a zero head, 0.95: clipping has work to do
STEPS = 100
SIGMA = 41.0
LR, MOMENTUM = 10.0, 0.9
PART = 500
"""Rows whose per-sample gradients Opacus' hooks hold together: 82 MB of them at 4,096 dimensions."""

SIZES = {"full": (50_000, 4096), "quick": (5_000, 1024), "tiny": (300, 16)}  # rows, dimensions


def rows(count: int, dims: int) -> tuple[Tensor, Tensor]:
    """Unit-norm features float32 [count, dims] and labels int64 [count]."""
    generator = torch.Generator().manual_seed(0)
    features = torch.empty(count, dims)
    for part in features.split(4096):  # in place: a second copy would count as memory of the probe
        part.normal_(generator=generator)
        part.div_(part.norm(dim=1, keepdim=True))
    return features, torch.randint(CLASSES, (count,), generator=generator)


def our_step(features: Tensor, labels: Tensor, sigma: float = SIGMA) -> tuple[Work, dict[str, Tensor]]:
    """The product's step, as ``head.fit_head`` makes it, and the state it moves."""
    count, dims = features.shape
    epsilon = 1.0 if sigma else math.inf
    plan = PrivatePlan("probe", count, 1.0, STEPS, sigma, CLIP_NORM, 1, epsilon, min(1e-5, 0.1 / count))
    settings = HeadSettings(LR, MOMENTUM, "average")
    state = begin_head(torch.zeros(dims, CLASSES))
    random, everyone = SystemRandom(), np.arange(count)

    def work() -> None:
        step = PrivateStep(0, everyone, plan, random)
        clipped = clipped_softmax_sum(features, labels, state["head"], plan.clip_norm)
        update_head(state, step.release({"head": clipped})["head"], settings, STEPS - 1, STEPS)

    return work, state


def opacus_step(mode: str, features: Tensor, labels: Tensor, sigma: float = SIGMA) -> tuple[Work, nn.Linear]:
    """Opacus' step, and the layer it moves."""
    linear = nn.Linear(features.shape[1], CLASSES, bias=False)
    nn.init.zeros_(linear.weight)
    step = OpacusStep(mode, linear, DpSgd(LR, MOMENTUM, sigma, CLIP_NORM, len(features)))
    parts = list(zip(features.split(PART), labels.split(PART), strict=True))
    return lambda: step(parts), linear


def jax_step(features: Tensor, labels: Tensor, sigma: float = SIGMA) -> tuple[Work, JaxStep]:
    """jax-privacy's step, and what holds its parameters; the features are copied."""
    settings = DpSgd(LR, MOMENTUM, sigma, CLIP_NORM, len(features))
    zeros = {"head": torch.zeros(features.shape[1], CLASSES)}
    step = JaxStep(linear_loss, zeros, settings, math.gcd(PART, len(features)))
    inputs, answers = as_array(features), as_array(labels)
    return lambda: step(inputs, answers), step


def case(scale: str) -> Case:
    """The product's step against two of Opacus' modes, and jax-privacy's."""
    count, dims = SIZES[scale]
    data: list[tuple[Tensor, Tensor]] = []

    def shared() -> tuple[Tensor, Tensor]:
        if not data:
            data.append(rows(count, dims))
        return data[0]

    def check() -> Mapping[str, float]:
        features, labels = (part[:1000] for part in shared())
        work, state = our_step(features, labels, sigma=0.0)
        residual = functional.one_hot(labels, CLASSES) - 1 / CLASSES
        plain = (residual.float() * (CLIP_NORM / residual.norm(dim=1, keepdim=True)).clamp(max=1)).T @ features
        work()
        found = {"formula": agree("probe", state["head"].T, LR * plain / len(features), 1e-4)}
        for mode in (HOOKS, GHOST):
            try:
                work, linear = opacus_step(mode, features, labels, sigma=0.0)
            except PeerMissing:
                continue
            work()
            found[mode] = agree(mode, state["head"].T, linear.weight, 1e-4)
        try:
            work, step = jax_step(features, labels, sigma=0.0)
        except PeerMissing:
            return found
        work()
        return found | {JAX: agree(JAX, state["head"], step.parameters()["head"], 1e-4)}

    return Case(
        ours=Side(OURS, lambda: our_step(*shared())[0]),
        others=(
            *(Side(mode, lambda mode=mode: opacus_step(mode, *shared())[0]) for mode in (HOOKS, GHOST)),
            Side(JAX, lambda: jax_step(*shared())[0]),
        ),
        comparisons=(
            Comparison(HOOKS, target=Limit(20)), Comparison(GHOST, target=Limit(20)), Comparison(JAX)
        ),
        check=check,
        sizes=f"{count:,} x {dims:,} features, {CLASSES} classes, full batch",
        unit="step",
        memory=(MemoryComparison("the features' bytes", 4 * count * dims, Limit(1.2, at_most=True)),),
    )
