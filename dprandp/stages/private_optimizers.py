"""Optimisers of noisy gradients: SGD, and Adam (AdamW where weights decay).

    optimizer = make_optimizer(OptimizerSettings("adam"), parameters)
    optimizer.step(parameters, noisy_gradients, lr)          # in place
    tensors = optimizer.state                                # for a checkpoint; optimizer.load_state(tensors) goes on

Guarantee:
    Everything here is a function of noisy gradients, public settings and what was released before: post-processing. No
    function of this file may ever be given a gradient without noise.

An optimiser's state is a flat dict of tensors, changed in place: saved and loaded, it goes on to the bit where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dprandp.errors import UsageError, nearest
from dprandp.finetune_options import OPTIMIZERS

DEFAULT_MOMENTUM = {"sgd": 0.0, "adam": 0.9}
"""De et al. 2022; Kingma & Ba 2015."""

@dataclass(frozen=True)
class OptimizerSettings:
    """Public settings.

    Attributes:
        kind: 'sgd' or 'adam'.
        momentum: β in [0, 1): of the velocity v ← βv + g, or Adam's β₁. None: ``DEFAULT_MOMENTUM``.
        second_momentum: Adam's β₂ in [0, 1).
        stabiliser: Adam's addition to the root of the second moment, above 0.
        weight_decay: λ ≥ 0, decoupled from the gradient: θ ← θ − lr λ θ (Loshchilov & Hutter 2019).

    Raises:
        UsageError: a value is outside its range, or does nothing.
    """

    kind: str = "sgd"
    momentum: float | None = None
    second_momentum: float = 0.999
    stabiliser: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise UsageError(f"the optimiser {self.kind!r} is unknown", fix=nearest(self.kind, OPTIMIZERS))
        for name in ("momentum", "second_momentum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} = {value!r} lies outside [0, 1)", fix=f"choose a {name} in that range")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay = {self.weight_decay!r} is no decay", fix="give 0 or a small number")
        if not 0 < self.stabiliser < math.inf:
            raise UsageError(f"stabiliser = {self.stabiliser!r} is not above 0", fix="give 1e-8, or a small number")

    @property
    def beta(self) -> float:
        """The momentum that holds."""
        return DEFAULT_MOMENTUM[self.kind] if self.momentum is None else self.momentum

    def in_words(self) -> str:
        """For the disclosure."""
        name = {"sgd": "SGD", "adam": "AdamW" if self.weight_decay else "Adam"}[self.kind]
        words = f"{name} on the noisy gradients, momentum {self.beta:g}"
        if self.weight_decay:
            words += f", weight decay {self.weight_decay:g}"
        return words


class Optimizer:
    """What all optimisers share. They differ in ``_update``.

    Args:
        settings: public.
        parameters: name -> float tensor of any shape; only shapes, types and devices matter.

    Attributes:
        state: name -> tensor; changed in place by ``step``. None of its names begins with that of a parameter.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        self.settings = settings
        self.state: dict[str, Tensor] = {}
        for prefix in self._buffers(parameters):
            self.state |= {f"{prefix}.{name}": torch.zeros_like(value) for name, value in parameters.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from tensors that were a ``state``, on any device; others among them are left alone.

        Raises:
            KeyError: one is missing (check the checkpoint first).
        """
        self.state = {name: tensors[name].to(own.device) for name, own in self.state.items()}

    @torch.no_grad()
    def step(
        self,
        parameters: Mapping[str, Tensor],
        noisy_gradients: Mapping[str, Tensor],
        lr: float,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One update, in place.

        Args:
            parameters: name -> float32 tensor, changed in place; the names that the optimiser was made with.
            noisy_gradients: the same names and shapes, with their noise; not changed.
            lr: learning rate, above 0.
            masks: name -> bool tensor; where False the parameter stays as it is. Names left out are updated whole.
        """
        self._begin()
        for name, gradient in noisy_gradients.items():
            moved = self._update(name, gradient, parameters[name])
            if self.settings.weight_decay:
                moved = moved + self.settings.weight_decay * parameters[name]
            if masks and name in masks:
                moved = moved * masks[name]
            parameters[name].sub_(moved, alpha=lr)

    def _buffers(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Prefixes of the state: one tensor like each parameter under each of them."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Before the updates of a step."""

    def _update(self, name: str, gradient: Tensor, value: Tensor) -> Tensor:
        """What is to be subtracted, before the learning rate; may be a tensor of the state, so it is not to be
        changed."""
        raise NotImplementedError


class Sgd(Optimizer):
    """v ← βv + g, θ ← θ − lr v: the momentum of DP-SGD as published."""

    def _buffers(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        return ("velocity",)

    def _update(self, name: str, gradient: Tensor, value: Tensor) -> Tensor:
        return self.state[f"velocity.{name}"].mul_(self.settings.beta).add_(gradient)


class Adam(Optimizer):
    """Adam with its bias corrections (Kingma & Ba 2015); decay is decoupled, which makes it AdamW.

    Under noise the second moment is mostly that of the noise: all coordinates then get about the same step. That is a
    property of DP-Adam, not mended here.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(settings, parameters)
        self.state["adam-steps"] = torch.zeros((), dtype=torch.int64, device="cpu")  # read in every update

    def _buffers(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        return ("first", "second")

    def reset_first_moment(self) -> None:
        """Forget the direction; scale and step count stay (Bu et al. 2024: at the switch from public to private)."""
        for name, value in self.state.items():
            if name.startswith("first."):
                value.zero_()

    def _begin(self) -> None:
        self.state["adam-steps"] += 1

    def _update(self, name: str, gradient: Tensor, value: Tensor) -> Tensor:
        beta, second_beta, count = self.settings.beta, self.settings.second_momentum, int(self.state["adam-steps"])
        first = self.state[f"first.{name}"].lerp_(gradient, 1 - beta)
        second = self.state[f"second.{name}"].lerp_(gradient.square(), 1 - second_beta)
        root = (second / (1 - second_beta**count)).sqrt_().add_(self.settings.stabiliser)
        return (first / (1 - beta**count)).div_(root)


def make_optimizer(settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> Optimizer:
    """An optimiser at its first step; arguments as for ``Optimizer``."""
    return {"sgd": Sgd, "adam": Adam}[settings.kind](settings, parameters)
