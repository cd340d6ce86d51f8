"""When public steps end and private ones begin, and how the two are mixed (Bu et al. 2024).

Both are functions of the configuration, of step numbers and of *public* images: they cost no privacy.

*Loss terms.* How much one private step can lower the loss, term by term, is estimated on *public* images (section 3).

With gradient G, Hessian H, covariance Σ of the gradients of single examples, expected batch B, noise σ in units of the
clip norm, and mean clip factor c, the step of the best length lowers the loss, to second order, by

    ΔL* = ½ |G|⁴ / ( GᵀHG + tr(HΣ)/B + σ² tr(H) / (c² B²) )

The first term is curvature along the gradient, the second the noise of the batch, the third is added by privacy: the
*decelerator*. A larger batch reduces only the last two; B* = √(σ² tr(H) / (c² GᵀHG)) makes the third as large as the
first. All three are for steps of gradient descent; an adaptive optimizer changes their metric.

tr(H) and tr(HΣ) come from Hutchinson's probes, vᵀHv with random v: v of random signs for the one; for the other
v = Σ_i s_i (g_i − G)/√(n−1) with random signs s_i, the gradient of a weighted loss, which needs no single gradient.

No function of this file may ever be called with private images: nothing here is made noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

from dprandp.config.schema import ContinueConfig, switch_step
from dprandp.privacy.clipping import clip_factors, per_example_gradients

# ----------------------------------------------------------------------------------------------------------- the switch

LATEST = 0.8
"""Fraction of all steps after which private ones begin under every rule, so that no run is without them."""

PATIENCE = 3
"""Evaluations of the public validation loss without progress that make a plateau."""

PROGRESS = 0.01
"""Smallest relative decrease of the loss below its earlier minimum that counts as progress."""

FEW = 0.1
"""The decelerator over the other terms (``LossTerms.slowdown``) at which private steps begin: a step then
achieves nine tenths of the improvement without noise. The median of the last ``PATIENCE`` evaluations decides."""


@dataclass(frozen=True)
class Look:
    """One evaluation of the public training."""

    step: int  # public steps done
    loss: float  # mean loss of the held-out public images
    slowdown: float | None = None  # of ``LossTerms``; NaN where undefined, None where not estimated

    def to_list(self) -> list[float | None]:
        """For a checkpoint; NaN becomes null there, which ``from_list`` undoes."""
        return [self.step, self.loss, self.slowdown, self.slowdown is not None]

    @classmethod
    def from_list(cls, values: Sequence[float | None]) -> Look:
        """From the result of ``to_list``, after conversion to JSON and back."""
        step, loss, slowdown, estimated = values
        found = None if not estimated else math.nan if slowdown is None else slowdown
        return cls(int(step), math.nan if loss is None else float(loss), found)


def plateau(losses: Sequence[float]) -> bool:
    """Whether the last ``PATIENCE`` losses show no progress over the best one before them; NaN is no progress."""
    if len(losses) <= PATIENCE:
        return False
    before = min((loss for loss in losses[:-PATIENCE] if not math.isnan(loss)), default=math.inf)
    return not any(loss < before * (1 - PROGRESS) for loss in losses[-PATIENCE:])


def few(looks: Sequence[Look]) -> bool:
    """Whether noise costs a private step little in the last ``PATIENCE`` evaluations; False for NaN."""
    if len(looks) < PATIENCE:
        return False
    ratios = [math.inf if look.slowdown is None else look.slowdown for look in looks[-PATIENCE:]]
    return median(math.inf if math.isnan(ratio) else ratio for ratio in ratios) <= FEW


def switch_now(config: ContinueConfig, looks: Sequence[Look], step: int) -> str | None:
    """The reason, in words, for beginning private steps before this step (from 0), or None; after these evaluations."""
    if config.mix == "private":
        return "no public step was given"
    if config.mix in ("cosine", "ratio"):
        return f"every step is private (mix = {config.mix})"
    if config.mix == "public":
        return None
    fixed = switch_step(config)
    if fixed is not None:
        return f"at step {fixed}, as given" if step >= fixed else None
    fresh = bool(looks) and looks[-1].step == step
    if fresh and config.switch == "plateau" and plateau([look.loss for look in looks]):
        return f"at step {step}: the public validation loss has reached a plateau"
    if fresh and config.switch == "decelerator" and few(looks):
        return f"at step {step}: the decelerator has become small, on public images ({looks[-1].slowdown:.2g})"
    latest = latest_switch(config)
    if step >= latest:
        return f"at step {latest}, the latest possible: the rule ({config.switch}) did not switch before"
    return None


def latest_switch(config: ContinueConfig) -> int:
    """The latest step at which private ones begin."""
    fixed = switch_step(config)
    return min(config.steps - 1, math.ceil(LATEST * config.steps)) if fixed is None else fixed


def most_private_steps(config: ContinueConfig) -> int:
    """The largest number of private steps: that of a rule at its first evaluation, or of a given step."""
    if config.mix == "public":
        return 0
    if config.mix != "step":
        return config.steps
    fixed = switch_step(config)
    return config.steps - (first_look(config) if fixed is None else fixed)


def first_look(config: ContinueConfig) -> int:
    """The first step at which a rule may switch."""
    looks = PATIENCE if config.switch == "plateau" else PATIENCE - 1  # beside the one at step 0
    return min(looks * config.check_every, latest_switch(config))


def public_weight(config: ContinueConfig, step: int, switch: int, public: int, private: int) -> float:
    """α of g = α g_public + (1 − α) g_private, in [0, 1], from numbers of public and private examples.

    Mix 'step': 1 before the switch (the first private step), then 0. 'cosine': 1 − cos(πt/2T), from 0 to 1 (Amid et al.
    2022, DPMD). 'ratio': the public part of all examples.
    """
    if config.mix == "cosine":
        return 1 - math.cos(math.pi * step / (2 * config.steps))
    if config.mix == "ratio":
        return public / (public + private)
    return 1.0 if step < switch or config.mix == "public" else 0.0


# ----------------------------------------------------------------------------------------------------------- loss terms

LossOfEach = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""(parameters, images [n, ...], labels [n]) -> losses [n], one for each example."""


@dataclass(frozen=True)
class LossTerms:
    """Estimates at one point of the training."""

    gradient_squared: float  # |G|²
    along_gradient: float  # GᵀHG
    trace: float  # tr(H)
    trace_covariance: float  # tr(HΣ)
    clip_factor: float  # c > 0, the mean over examples of what their gradients are multiplied by
    noise_multiplier: float  # σ
    batch: float  # B

    @property
    def sampling(self) -> float:
        """tr(HΣ)/B."""
        return self.trace_covariance / self.batch

    @property
    def decelerator(self) -> float:
        """σ² tr(H) / (c² B²): privacy's term of the denominator."""
        return self.trace * (self.noise_multiplier / (self.clip_factor * self.batch)) ** 2

    @property
    def improvement(self) -> float:
        """ΔL*; NaN where the estimated curvature is not positive."""
        below = self.along_gradient + self.sampling + self.decelerator
        return 0.5 * self.gradient_squared**2 / below if below > 0 else math.nan

    @property
    def slowdown(self) -> float:
        """The decelerator over the sum of the other two terms; NaN where they are not positive.

        1 means that privacy halves the improvement of a step; 0, that it costs nothing.
        """
        others = self.along_gradient + self.sampling
        return self.decelerator / others if others > 0 and self.trace >= 0 else math.nan

    @property
    def best_batch(self) -> float:
        """B*; NaN where a curvature is not positive."""
        if self.along_gradient <= 0 or self.trace < 0:
            return math.nan
        return self.noise_multiplier / self.clip_factor * math.sqrt(self.trace / self.along_gradient)

    def to_dict(self) -> dict[str, float]:
        """All attributes and properties by name."""
        derived = ("sampling", "decelerator", "improvement", "slowdown", "best_batch")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def loss_terms(
    loss_of_each: LossOfEach,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    noise_multiplier: float,
    batch: float,
    probes: int,
    generator: torch.Generator,
) -> LossTerms:
    """Estimate the terms on n ≥ 2 *public* examples, for private steps with σ and B.

    Args:
        loss_of_each: twice differentiable; each loss of its own example alone.
        parameters: those of which H is the Hessian.
        probes: Hutchinson probes for each trace, at least 1.
        generator: public randomness, on the CPU.
    """
    count = len(labels)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    values = list(leaves.values())

    def gradient_of(losses: Tensor, graph: bool = False) -> list[Tensor]:
        found = torch.autograd.grad(losses, values, create_graph=graph, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]

    losses = loss_of_each(leaves, images, labels)
    weighted = []
    for _ in range(probes):
        signs = _signs(count, generator).to(losses)
        weights = (signs - signs.mean()) / math.sqrt(count - 1)
        weighted.append([g.detach() for g in gradient_of((weights * losses).sum())])
    gradient = gradient_of(losses.mean(), graph=True)
    fixed = [g.detach() for g in gradient]

    def curvature(direction: list[Tensor]) -> float:
        slope = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True) if g.requires_grad)
        if not isinstance(slope, Tensor):
            return 0.0  # a loss that is linear in all parameters
        return _dot(gradient_of(slope), direction)

    def random() -> list[Tensor]:
        return [_signs(v.numel(), generator).view(v.shape).to(v) for v in values]

    along = curvature(fixed)
    trace = sum(curvature(random()) for _ in range(probes)) / probes
    covariance = sum(curvature(direction) for direction in weighted) / probes
    return LossTerms(
        gradient_squared=_dot(fixed, fixed),
        along_gradient=along,
        trace=trace,
        trace_covariance=covariance,
        clip_factor=mean_clip_factor(loss_of_each, parameters, images, labels),
        noise_multiplier=noise_multiplier,
        batch=batch,
    )


def mean_clip_factor(
    loss_of_each: LossOfEach, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor, microbatch: int = 16
) -> float:
    """The mean over public examples of the factor of automatic clipping with C = 1, 1/(|g_i| + .01)."""

    def loss(values: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return loss_of_each(values, image[None], label[None])[0]

    factors = []
    for part in per_example_gradients(loss, parameters, images, labels, microbatch):
        squares = torch.stack([g.flatten(1).double().square().sum(dim=1) for g in part.values()])
        factors.append(clip_factors(squares.sum(dim=0).sqrt(), 1.0, automatic=True))
    return float(torch.cat(factors).mean())


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """+1 or -1 each with probability 1/2, float32 [count]."""
    return torch.randint(0, 2, (count,), generator=generator).float().mul_(2).sub_(1)


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)))
