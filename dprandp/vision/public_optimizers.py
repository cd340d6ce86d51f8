"""Optimisers of public training by name, and their state as named tensors, so that a checkpoint resumes exactly.

``sgd`` with momentum (published), ``adamw`` (Loshchilov & Hutter 2019) and ``muon``: orthogonalised momentum for the
convolutions (Jordan et al. 2024), AdamW for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dprandp.config import PretrainConfig
from dprandp.errors import UsageError
from dprandp.pretrain_config import lr_of

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024: after five rounds singular values lie between about .7 and 1.2."""

_STATE = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")
_NAMES = {"momentum_buffer": "momentum"}  # in checkpoints; the others keep torch's name


def build_optimizer(config: PretrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a configuration names, over all parameters in one group."""
    lr, decay = lr_of(config), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=decay)
    if config.optimizer == "muon":
        return Muon(parameters, lr=lr, momentum=config.momentum, weight_decay=decay)
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


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for convolutions, AdamW for the rest, at one learning rate.

    A convolution's weight [out, in, h, w] is the matrix [out, in h w]. Its Nesterov momentum, with singular values
    brought near 1, is scaled by .2 √(longer side), which gives it the root mean square of a usual AdamW update (Liu et
    al. 2025, arXiv 2502.16982), so that one learning rate serves both.

    Args:
        parameters: to train. lr, momentum, weight_decay: of both; the decay is decoupled.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._orthogonal(parameter, group) if parameter.ndim == 4 else self._adam(parameter)
                parameter.sub_(group["lr"] * update)

    def _orthogonal(self, parameter: nn.Parameter, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
        matrix = (parameter.grad + group["momentum"] * momentum).flatten(1)
        scale = 0.2 * math.sqrt(max(matrix.shape))
        return scale * orthogonalised(matrix).view(parameter.shape)

    def _adam(self, parameter: nn.Parameter) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count = float(state["step"])
        first, second = (1 - beta**count for beta in ADAM_BETAS)
        state["exp_avg"].lerp_(gradient, 1 - ADAM_BETAS[0])
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        return (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + ADAM_EPSILON)


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Singular values brought near 1, singular vectors kept, by Newton and Schulz's iteration.

    Args:
        matrix: float [m, n].
        rounds: of the iteration.

    Returns:
        float [m, n]; zero stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(rounds):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
