"""Phase III: a whole DP-SGD step of a WRN against a plain step on the same views, Opacus and jax-privacy.

Our side is what ``finetune/__init__.py`` does in a step: views, clipped sum, noise, momentum, EMA. The plain side makes
the same views and takes an ordinary SGD step; once as torch does by default, once with channels
last in memory, which ours has too and which is faster. Opacus has no rule for standardised filters, so the
network is without them where it takes part (as published by Tang et al. 2023).

In full runs all sides compute in the precision that a stage would decide for on this processor (jax-privacy in
float32); in quick ones in float32, so that their bounds mean the same everywhere.

Noise and update do not depend on the batch: in a published step of 4,096 examples they vanish, in the small ones here
they do not. So the clipped sum alone is a side too: what a large batch tends to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark import generator
from benchmark.cases import OURS, Case, Comparison, Limit, MemoryComparison, PeerMissing, Side
from benchmark.pairs import agree
from benchmark.peer_jax import JAX, JaxStep, as_array, wrn_loss
from benchmark.peer_opacus import FUNCTORCH, GHOST, HOOKS, DpSgd, OpacusStep, refuse_views
from benchmark.timing import Work
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor
from dprandp.models.precision import AUTO, BFLOAT16, FLOAT32, decide
from dprandp.models.whitening import PooledOnly
from dprandp.privacy.mechanism import PrivatePlan, PrivateStep
from dprandp.privacy.randomness import SystemRandom
from dprandp.vision.views import keyed_uniforms, private_views

PLAIN = "non-private step"
PLAIN_LAST = "non-private step, channels last"
SUM_ALONE = "clipped sum alone"
SIGMA, LR, MOMENTUM, EMA = 9.0, 0.4, 0.0, 0.9999
CLIP_NORM = 0.5

TOLERANCE = {FLOAT32: 1e-2, BFLOAT16: 0.3}
"""How far gradients of two sides may be apart, by precision. float32 itself is up to 3e-3 away from float64 here, as at
this depth some ReLUs open on the other side; of bfloat16, with 8 bits, many do."""


@dataclass(frozen=True)
class Shape:
    """Size of a step, whether filters are standardised, and the precision of all sides."""

    arch: str
    examples: int
    views: int
    standardised: bool = True
    precision: str = FLOAT32

    def __str__(self) -> str:
        filters = "" if self.standardised else ", filters not standardised"
        return f"{self.arch}{filters}, {self.examples} examples x {self.views} views, {self.precision}"


SHAPES = {
    ("finetune", "full"): Shape("wrn-16-4", 16, 16),
    ("finetune", "quick"): Shape("wrn-16-4", 2, 16),
    ("finetune", "tiny"): Shape("wrn-10-1", 3, 2),
    ("finetune-opacus", "full"): Shape("wrn-16-4", 8, 16, standardised=False),
    ("finetune-opacus", "quick"): Shape("wrn-16-4", 1, 16, standardised=False),
    ("finetune-opacus", "tiny"): Shape("wrn-10-1", 3, 2, standardised=False),
    ("one-view", "full"): Shape("wrn-16-4", 64, 1),
    ("one-view", "quick"): Shape("wrn-16-4", 16, 1),
    ("one-view", "tiny"): Shape("wrn-10-1", 4, 1),
    ("one-view-opacus", "full"): Shape("wrn-16-4", 32, 1, standardised=False),
    ("one-view-opacus", "quick"): Shape("wrn-16-4", 8, 1, standardised=False),
    ("one-view-opacus", "tiny"): Shape("wrn-10-1", 4, 1, standardised=False),
}


def shape_of(pair: str, scale: str) -> Shape:
    """The size of a pair's step."""
    shape = SHAPES[pair, scale]
    return replace(shape, precision=decide(AUTO, "cpu")) if scale == "full" else shape


class Bench:
    """A model and a batch; every side works on its own copy of the model."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        config = PretrainConfig(
            arch=shape.arch, weight_standardisation=shape.standardised, precision=shape.precision
        )
        extractor = build_extractor(config, torch.Generator().manual_seed(0))
        self._model = Classifier(extractor, PooledOnly(extractor.feature_dim), 10)
        self._model.head.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        images = generator.images(32, shape.examples)
        labels = torch.randint(10, (shape.examples,), generator=torch.Generator().manual_seed(2))
        self.batch = Batch(images, labels, torch.arange(shape.examples))

    def model(self) -> Classifier:
        """A copy."""
        return copy.deepcopy(self._model)

    def views(self, step: int = 0) -> tuple[Tensor, Tensor]:
        """The views that our side makes of the batch, uint8 [B · K, 3, 32, 32], and a label for each."""
        draws = keyed_uniforms(self.batch.members, step, 0, self.shape.views)
        made = private_views(self.batch.images, self.shape.views, draws, flip=True)
        return made.flatten(0, 1), self.batch.labels.repeat_interleave(self.shape.views)

    def sums(self, model: Classifier, clip_norm: float = CLIP_NORM) -> Callable[[Mapping[str, Tensor]], dict]:
        """Parameters -> clipped sum of the batch."""
        sums = ClippedSums(model, SumSettings(1.0, self.shape.views, 0, True, clip_norm))
        return lambda parameters: sums.of(parameters, 0, self.batch)

    def ours(self, sigma: float = SIGMA) -> Work:
        """The product's step, noise and update included."""
        model, count = self.model(), self.shape.examples
        sums, random = self.sums(model), SystemRandom()
        state = {name: value.detach().clone() for name, value in model.named_parameters()}
        velocity = {name: torch.zeros_like(value) for name, value in state.items()}
        ema = {name: value.clone() for name, value in state.items()}
        epsilon = 1.0 if sigma else math.inf
        plan = PrivatePlan("finetune", 10 * count, 0.1, 100, sigma, CLIP_NORM, self.shape.views, epsilon, 1e-5)

        def work() -> None:
            clipped = sums(state)
            update = PrivateStep(0, np.arange(count), plan, random).release(clipped)
            for name, gradient in update.items():
                velocity[name].mul_(MOMENTUM).add_(gradient)
                state[name].sub_(velocity[name], alpha=LR)
                ema[name].lerp_(state[name], 1 - EMA)

        return work

    def sum_alone(self) -> Work:
        """Views and clipped sum: our step without noise and update."""
        model = self.model()
        sums = self.sums(model)
        state = {name: value.detach().clone() for name, value in model.named_parameters()}
        return lambda: sums(state)

    def plain(self, memory_format: torch.memory_format = torch.contiguous_format) -> Work:
        """An ordinary step: one forward and backward pass of all views, SGD."""
        model = self.model().to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

        def work() -> None:
            optimizer.zero_grad(set_to_none=True)
            self.plain_loss(model, memory_format).backward()
            optimizer.step()

        return work

    def plain_loss(
        self, model: Classifier, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Mean cross-entropy of all views."""
        views, labels = self.views()
        scores = model(model.extractor.normalise(views).contiguous(memory_format=memory_format))
        return functional.cross_entropy(scores, labels)

    def opacus(self, mode: str, sigma: float = SIGMA) -> tuple[Work, nn.Sequential]:
        """Opacus' step, and the model that it moves: extractor and a linear layer."""
        refuse_views(mode, self.shape.views)  # before the network is built for nothing
        model = self.model()
        linear = nn.Linear(*model.head.shape, bias=False)
        linear.weight.data.copy_(model.head.detach().T)
        network = nn.Sequential(model.extractor, linear)
        settings = DpSgd(LR, MOMENTUM, sigma, CLIP_NORM, self.shape.examples)
        step = OpacusStep(mode, network, settings, self.shape.precision)

        def work() -> None:
            views, labels = self.views()
            step([(model.extractor.normalise(views), labels)], self.shape.views)

        return work, network

    def jax(self, sigma: float = SIGMA) -> tuple[Work, JaxStep]:
        """jax-privacy's step, and what holds its parameters."""
        model, views = self.model(), self.shape.views
        settings = DpSgd(LR, MOMENTUM, sigma, CLIP_NORM, self.shape.examples)
        together = math.gcd(max(1, 16 // views), self.shape.examples)
        step = JaxStep(wrn_loss(model.extractor), dict(model.named_parameters()), settings, together)
        answers = as_array(self.batch.labels)

        def work() -> None:
            made, _ = self.views()
            step(as_array(model.extractor.normalise(made).unflatten(0, (-1, views))), answers)

        return work, step

    def check(self, modes: tuple[str, ...]) -> Mapping[str, float]:
        """Sums of unclipped gradients against the plain gradient, of clipped ones against Opacus."""
        tolerance = TOLERANCE[self.shape.precision]
        model = self.model()
        state = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.plain_loss(model).backward()
        plain = torch.cat([value.grad.flatten() for value in model.parameters()])
        wide = self.sums(self.model(), clip_norm=1e8)(state)
        ours = torch.cat([wide[name].flatten() for name in state]) / self.shape.examples
        found = {PLAIN: agree(PLAIN, ours, plain, tolerance)}
        if modes:
            clipped = self.sums(self.model())(state)
            names = {f"extractor.{name}": f"0.{name}" for name, _ in model.extractor.named_parameters()}
            ours = torch.cat([clipped["head"].T.flatten(), *(clipped[name].flatten() for name in names)])
        for mode in modes:
            try:
                work, network = self.opacus(mode, sigma=0.0)
            except PeerMissing:
                continue
            before = {name: value.detach().clone() for name, value in network.named_parameters()}
            work()
            moved = {name: (before[name] - value.detach()) / LR for name, value in network.named_parameters()}
            theirs = torch.cat([moved["1.weight"].flatten(), *(moved[name].flatten() for name in names.values())])
            found[mode] = agree(mode, ours / self.shape.examples, theirs, tolerance)
        if modes:
            try:
                work, step = self.jax(sigma=0.0)
            except PeerMissing:
                return found
            work()
            after = step.parameters()
            theirs = torch.cat([((state[name] - after[name]) / LR).flatten() for name in state])
            ours = torch.cat([clipped[name].flatten() for name in state])
            found[JAX] = agree(JAX, ours / self.shape.examples, theirs, tolerance)
        return found


def plain_case(pair: str, time_target: float, memory_target: float | None) -> Callable[[str], Case]:
    """Our step against the non-private one."""

    def build(scale: str) -> Case:
        bench = Bench(shape_of(pair, scale))
        most = Limit(time_target, at_most=True)
        memory = (
            (MemoryComparison(PLAIN, target=Limit(memory_target, at_most=True)),) if memory_target is not None else ()
        )
        return Case(
            ours=Side(OURS, bench.ours, bench.shape.examples),
            others=(
                Side(PLAIN, bench.plain, bench.shape.examples),
                Side(PLAIN_LAST, lambda: bench.plain(torch.channels_last), bench.shape.examples),
                Side(SUM_ALONE, bench.sum_alone, bench.shape.examples),
            ),
            comparisons=(
                Comparison(PLAIN, "× the time", cost=True, target=most),
                Comparison(PLAIN_LAST, "× the time", cost=True, target=most),
                Comparison(SUM_ALONE, "× the time (rest: noise and update)", cost=True),
            ),
            check=lambda: bench.check(()),
            sizes=str(bench.shape),
            unit="example",
            memory=memory,
        )

    return build


def opacus_case(pair: str, target: float | None) -> Callable[[str], Case]:
    """Our step against Opacus' modes and jax-privacy; the target is for Opacus' hooks."""

    def build(scale: str) -> Case:
        bench = Bench(shape_of(pair, scale))
        modes = (HOOKS, FUNCTORCH, GHOST)
        return Case(
            ours=Side(OURS, bench.ours, bench.shape.examples),
            others=(
                *(Side(mode, lambda mode=mode: bench.opacus(mode)[0], bench.shape.examples) for mode in modes),
                Side(JAX, lambda: bench.jax()[0], bench.shape.examples),
            ),
            comparisons=tuple(
                Comparison(mode, target=Limit(target) if target and mode == HOOKS else None) for mode in (*modes, JAX)
            ),
            check=lambda: bench.check(modes),
            sizes=str(bench.shape),
            unit="example",
            memory=(MemoryComparison(HOOKS),),
        )

    return build
