"""Optimisers of public training by name, and their state as named tensors, so that a checkpoint resumes exactly.

``sgd`` with momentum (published), and ``adamw`` (Loshchilov & Hutter 2019).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dprandp.config import PretrainConfig
from dprandp.errors import UsageError
from dprandp.pretrain_config import lr_of

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8

_STATE = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")
_NAMES = {"momentum_buffer": "momentum"}  # in checkpoints; the others keep torch's name


def build_optimizer(config: PretrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a configuration names, over all parameters in one group."""
    lr, decay = lr_of(config), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=decay)
    raise UsageError(f"there is no optimiser called {config.optimizer!r}", fix="see dprandp pretrain --help")


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything the next update depends on, beside parameters and settings: ``NAME.INDEX`` -> tensor."""
    tensors = {}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # SGD without momentum
                tensors[f"{_NAMES.get(name, name)}.{index}"] = value
    return tensors


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Go on from what ``state_of`` returned; tensors of other names are passed over."""
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for name in _STATE:
            saved = tensors.get(f"{_NAMES.get(name, name)}.{index}")
            if saved is None:
                continue
            if saved.ndim == 0:  # a count of steps
                optimizer.state[parameter][name] = saved.detach().clone().cpu()
            else:  # in the parameter's memory format: another order of sums is another last bit
                optimizer.state[parameter][name] = torch.empty_like(parameter).copy_(saved)
