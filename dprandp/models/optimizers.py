"""Optimizers of torch whose state exists from the beginning, as named tensors, so that a checkpoint resumes exactly.

torch makes an optimizer's state in its first step; then there would be nothing to compare a checkpoint with.

Also steps with noisy gradients (``Optimizer``), by torch's SGD with momentum and Adam (AdamW where weights decay).

Guarantee:
    Everything in ``Optimizer`` is post-processing: a function of noisy gradients, public settings and earlier releases.
    Never call it with a gradient of private images without its noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig, lr_of


def build_optimizer(config: PretrainConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer of public training over named parameters: ``sgd`` with momentum (published), or ``adamw``."""
    lr, decay = lr_of(config), config.weight_decay
    if config.optimizer == "sgd":
        return begun(torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay))
    return begun(torch.optim.AdamW(parameters, lr=lr, weight_decay=decay))


def begun(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW with the state that torch gives it in its first step; all its parameters in one group."""
    (group,) = optimizer.param_groups
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        if "betas" in group:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # read in every step
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        elif group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the next step depends on beside parameters and settings: name -> tensor that steps change."""
    (group,) = optimizer.param_groups
    return {
        f"optimizer.{kind}.{name}": value
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def restore(state: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into a state of the same names and shapes, in place; others among them are left alone."""
    for name, value in state.items():
        value.copy_(saved[name])


# ------------------------------------------------------------------------------------------------------ noisy gradients

DEFAULT_MOMENTUM = {"sgd": 0.0, "adam": 0.9}
"""De et al. 2022; Kingma & Ba 2015."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Public settings, in the ranges of the configuration."""

    kind: str = "sgd"  # or 'adam'
    momentum: float | None = None  # β of the velocity v ← βv + g, or Adam's β₁; None: ``DEFAULT_MOMENTUM``
    weight_decay: float = 0.0  # λ. Adam's is decoupled (Loshchilov & Hutter 2019); SGD's is part of g

    @property
    def beta(self) -> float:
        """The momentum, as given or by default."""
        return DEFAULT_MOMENTUM[self.kind] if self.momentum is None else self.momentum

    def in_words(self) -> str:
        """For the disclosure."""
        name = {"sgd": "SGD", "adam": "AdamW" if self.weight_decay else "Adam"}[self.kind]
        words = f"{name} on the noisy gradients, momentum {self.beta:g}"
        return words + (f", weight decay {self.weight_decay:g}" if self.weight_decay else "")


class Optimizer:
    """SGD or Adam over named parameters.

    Under noise Adam's second moment is mostly that of the noise, so all coordinates get about the same step. This is a
    property of DP-Adam, not corrected here.

    Args:
        settings: public.
        parameters: name -> float32 tensor of any shape; ``step`` changes them in place.
    """

    def __init__(self, settings: OptimizerSettings, parameters: Mapping[str, Tensor]) -> None:
        self.parameters, decay = dict(parameters), settings.weight_decay
        named = list(self.parameters.items())
        if settings.kind == "sgd":
            made = torch.optim.SGD(named, momentum=settings.beta, weight_decay=decay)
        else:
            made = torch.optim.AdamW(named, betas=(settings.beta, 0.999), weight_decay=decay)
        self._torch = begun(made)

    @property
    def state(self) -> dict[str, Tensor]:
        """Name -> tensor that ``step`` changes in place; all names begin with ``optimizer.``."""
        return state_of(self._torch)

    def reset_first_moment(self) -> None:
        """Reset Adam's first moment; scale and step count stay (Bu et al. 2024: at the switch from public to
        private)."""
        for state in self._torch.state.values():
            state["exp_avg"].zero_()

    @torch.no_grad()
    def step(self, noisy_gradients: Mapping[str, Tensor], lr: float, masks: Mapping[str, Tensor] | None = None) -> None:
        """One update of the parameters that have a gradient.

        Args:
            noisy_gradients: name -> tensor like the parameter, with its noise; not changed.
            lr: learning rate, above 0.
            masks: name -> bool tensor; where False the parameter does not change, not even by momentum or decay.
                Names left out are updated whole.
        """
        stay = {name: self.parameters[name].clone() for name in masks or ()}
        for name, gradient in noisy_gradients.items():
            self.parameters[name].grad = gradient
        self._torch.param_groups[0]["lr"] = lr
        self._torch.step()
        for parameter, state in self._torch.state.items():
            if parameter.grad is None and "step" in state:
                state["step"] += 1  # Adam's count is of all steps, also of those without a gradient of this parameter
        self._torch.zero_grad()
        for name, before in stay.items():
            self.parameters[name].copy_(torch.where(masks[name], self.parameters[name], before))
