"""The other side: a DP-SGD step by Opacus, with its own per-sample gradients, clipping, noise and optimizer.

Three of its modes: *hooks* (per-sample gradients layer by layer), *functorch* (the same by ``vmap`` within each layer)
and *ghost* (norms without per-sample gradients, then a second backward pass). With K views of an example the per-sample
gradients are averaged over the views before Opacus clips them, as published DP-SGD code with augmentation does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmark.cases import PeerMissing
from dprandp.models.precision import FLOAT32, autocast

HOOKS, FUNCTORCH, GHOST = "Opacus hooks", "Opacus functorch", "Opacus ghost"
MODES = (HOOKS, FUNCTORCH, GHOST)

HOW = "pip install 'dprandp[bench]' brings it"


@dataclass(frozen=True)
class DpSgd:
    """Settings of the step: SGD with momentum on clipped, noisy means over ``batch`` records."""

    lr: float
    momentum: float
    noise_multiplier: float
    clip_norm: float
    batch: int


def refuse_views(mode: str, views: int) -> None:
    """Refuse (PeerMissing) to average views in a mode that never has the gradients whose mean is to be clipped."""
    if mode == GHOST and views > 1:
        raise PeerMissing("clips each view by itself: it never has the gradients whose mean is to be clipped")


def preload() -> None:
    """Load the library where it is installed, so that its own size does not count as memory of a step."""
    try:
        import opacus  # noqa: F401
    except ImportError:
        return


class OpacusStep:
    """One step of a model, in parts where the batch does not fit into memory as per-sample gradients.

    Args:
        mode: of ``MODES``.
        model: float inputs [B, ...] -> scores [B, classes]; trained in place.
        settings: of the step.
        precision: 'float32' or 'bfloat16', what the model's products are computed in: that of the other side.

    Attributes:
        model: the wrapped module's own parameters, under its own names.

    Raises:
        PeerMissing: Opacus is not installed.
    """

    def __init__(self, mode: str, model: nn.Module, settings: DpSgd, precision: str = FLOAT32) -> None:
        try:
            from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
            from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
            from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
        except ImportError as error:
            raise PeerMissing(f"Opacus cannot be imported ({error}); {HOW}") from error
        self.model, self._device = model, next(model.parameters()).device
        model.precision = precision
        inner = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
        noise = {
            "noise_multiplier": settings.noise_multiplier,
            "max_grad_norm": settings.clip_norm,
            "expected_batch_size": settings.batch,
        }
        criterion: Callable = nn.CrossEntropyLoss()
        if mode == GHOST:
            self._wrapped = GradSampleModuleFastGradientClipping(
                model, max_grad_norm=settings.clip_norm, use_ghost_clipping=True
            )
            self._optimizer = DPOptimizerFastGradientClipping(inner, **noise)
            self._criterion = DPLossFastGradientClipping(self._wrapped, self._optimizer, criterion)
        else:
            self._wrapped = GradSampleModule(model, force_functorch=mode == FUNCTORCH)
            self._optimizer = DPOptimizer(inner, **noise)
            self._criterion = criterion
        self._mode = mode

    def __call__(self, parts: Sequence[tuple[Tensor, Tensor]], views: int = 1) -> None:
        """One update.

        Args:
            parts: (float inputs [b · views, ...], int64 labels [b · views]), the views of one example next to each
                other; their gradients are in memory together, part after part.
            views: K. Ghost clipping cannot average views before the clip: 1 only.
        """
        refuse_views(self._mode, views)
        for number, (inputs, labels) in enumerate(parts, 1):
            self._optimizer.signal_skip_step(do_skip=number < len(parts))
            self._optimizer.zero_grad(set_to_none=True)
            with autocast(self.model, self._device):
                scores = self._wrapped(inputs)
            self._criterion(scores.float(), labels).backward()
            if views > 1:
                for parameter in self.model.parameters():
                    each = parameter.grad_sample
                    parameter.grad_sample = each.view(-1, views, *each.shape[1:]).mean(dim=1)
            self._optimizer.step()
