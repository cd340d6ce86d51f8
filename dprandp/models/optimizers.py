"""Optimizers of torch whose state exists from the beginning, as named tensors, so that a checkpoint resumes exactly.

torch makes an optimizer's state in its first step; then there would be nothing to compare a checkpoint with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
