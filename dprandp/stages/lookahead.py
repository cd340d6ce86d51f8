"""Where a step takes its gradients, where that is not at the parameters: DP-SAT and DiSK.

**DP-SAT** (Park et al. 2023, "Differentially Private Sharpness-Aware Training", arXiv 2306.05651) takes all gradients
at θ + ρ g/‖g‖, g being the *previous* step's noisy gradient: the direction is known already, so sharpness-aware
training costs no second gradient and no privacy.

**DiSK** (Zhang et al. 2024, arXiv 2410.03883) filters noisy gradients with a simplified Kalman filter. The prediction
needs the Hessian times the last move d = θ_t − θ_{t−1}, which two gradients of each example stand for:

    h_i = (1 − a) ∇ℓ_i(θ) + a ∇ℓ_i(θ + γ d),   a = (1 − κ)/(κ γ)          one gradient per record
    g ← (1 − κ) g + κ (Σ_i clip(h_i) + N(0, (σC)²))/B

Guarantee:
    Both are a choice of the point (θ, and d or g, are functions of earlier noisy gradients), and post-processing after
    the noise. A record enters a step through one vector, h_i, which is clipped to C *after* it was combined: the sum's
    sensitivity is C, whatever a is, and so the noise is σC. In particular σ is not divided by √((1 − a)² + a²), as
    if the two gradients had been clipped and made noisy apart: that would be less noise than was accounted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dprandp.config import FinetuneConfig

DEFAULT_REACH = 0.5
"""γ, with κ = .7 as in the authors' experiments."""


@dataclass(frozen=True)
class Ahead:
    """A second point, and the weight a that its gradients have beside 1 − a of the first."""

    weight: float
    parameters: dict[str, Tensor]


class Plain:
    """Gradients are taken at the parameters. Also the interface of the other two.

    Attributes:
        state: name -> tensor, changed in place; for the checkpoint.
    """

    passes = 1

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from tensors that were a ``state``, on any device; others among them are left alone."""
        self.state = {name: tensors[name].to(own.device) for name, own in self.state.items()}

    def points(self, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], Ahead | None]:
        """Where this step's gradients are taken: the first point, and the second if there is one.

        Args:
            parameters: name -> the parameters as they stand; not changed.
        """
        return parameters, None

    def filtered(self, noisy: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the optimiser is given of a step's noisy gradients."""
        return noisy

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Note a step's move."""

    @property
    def follows_moves(self) -> bool:
        """Whether ``moved`` wants to be called."""
        return False

    def in_words(self) -> str:
        """For the disclosure."""
        return "at the parameters"


class Sharpness(Plain):
    """DP-SAT; ρ is in units of the (scaled) parameters' joint L2 norm."""

    def __init__(self, rho: float, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rho = rho
        self.state = {f"ascent.{name}": torch.zeros_like(value) for name, value in parameters.items()}

    def points(self, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], Ahead | None]:
        """As ``Plain.points``; at the first step, which has no previous gradient, the parameters themselves."""
        # an accelerator is not kept from working: the log of the step before has waited for these
        norm = float(torch.stack([value.norm() for value in self.state.values()]).norm())
        if norm == 0:
            return parameters, None
        reach = self.rho / norm
        return {n: torch.add(v, self.state[f"ascent.{n}"], alpha=reach) for n, v in parameters.items()}, None

    def filtered(self, noisy: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients as they are; they are the next step's direction."""
        for name, value in noisy.items():
            self.state[f"ascent.{name}"].copy_(value)
        return noisy

    def in_words(self) -> str:
        """For the disclosure."""
        return f"{self.rho:g} along the previous noisy gradient (DP-SAT)"


class Kalman(Plain):
    """DiSK. Where a = 1, which is γ = (1 − κ)/κ, one gradient is enough."""

    def __init__(self, kappa: float, reach: float, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kappa, self.reach = kappa, reach
        self.weight = (1 - kappa) / (kappa * reach)
        self.passes = 1 if math.isclose(self.weight, 1, rel_tol=1e-9) else 2
        self.state = {f"kalman.{name}": torch.zeros_like(value) for name, value in parameters.items()}
        self.state |= {f"move.{name}": torch.zeros_like(value) for name, value in parameters.items()}
        self.state["kalman-steps"] = torch.zeros((), dtype=torch.int64, device="cpu")  # read in every step

    def points(self, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], Ahead | None]:
        """As ``Plain.points``; at the first step, before any move, the parameters alone."""
        if int(self.state["kalman-steps"]) == 0:
            return parameters, None
        ahead = {n: torch.add(v, self.state[f"move.{n}"], alpha=self.reach) for n, v in parameters.items()}
        return (ahead, None) if self.passes == 1 else (parameters, Ahead(self.weight, ahead))

    def filtered(self, noisy: dict[str, Tensor]) -> dict[str, Tensor]:
        """The filter's estimate, new tensors; at the first step the gradients themselves."""
        part = 1.0 if int(self.state["kalman-steps"]) == 0 else self.kappa
        self.state["kalman-steps"] += 1
        return {name: self.state[f"kalman.{name}"].lerp_(value, part).clone() for name, value in noisy.items()}

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Keep the move θ_t − θ_{t−1}."""
        for name, value in after.items():
            torch.sub(value, before[name], out=self.state[f"move.{name}"])

    @property
    def follows_moves(self) -> bool:
        """It does."""
        return True

    def in_words(self) -> str:
        """For the disclosure."""
        return (
            f"at the parameters and {self.reach:g} of the last move ahead, combined in each record before its clip "
            f"(weights {1 - self.weight:.3g} and {self.weight:.3g}); the noisy sums pass a Kalman filter of gain "
            f"{self.kappa:g} (DiSK)"
        )


def make_lookahead(config: FinetuneConfig, parameters: Mapping[str, Tensor]) -> Plain:
    """What a configuration asks for, at its first step."""
    if config.sharpness is not None:
        return Sharpness(config.sharpness, parameters)
    if config.kalman is not None:
        return Kalman(config.kalman, config.kalman_reach or DEFAULT_REACH, parameters)
    return Plain()
