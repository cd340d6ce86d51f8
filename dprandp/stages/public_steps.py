"""The state of ``continue``, and what its public images do to it: gradients, looks, and the moment of the switch.

Nothing in this file sees a private image. What private steps have made of the parameters is released anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from dprandp.config import ContinueConfig
from dprandp.stages.loss_terms import LossTerms, loss_terms
from dprandp.stages.private_optimizers import Optimizer, OptimizerSettings
from dprandp.stages.public_tasks import PublicTask
from dprandp.stages.switching import Look
from dprandp.vision.classifier import Classifier
from dprandp.vision.optimizers import restore
from dprandp.vision.precision import autocast

PUBLIC_HEAD = "public_head"
TERM_EXAMPLES = 32
"""Public examples that loss terms are estimated on."""
TERM_PROBES = 4
HELD_OUT_BATCH = 256


class Training:
    """Parameters, their moving average, and Adam; public and private steps change them in turn.

    Args:
        config: learning rates, decays, seed.
        model: extractor and private head, on the device that computes.
        task: the public images.

    Attributes:
        parameters: name -> float32: ``extractor.*``, ``head``, and ``public_head`` where the task has other classes.
        average: name -> float32, the moving average since the switch.
        optimizer: AdamW; its state is kept over the switch, but for the first moment.
        looks: at the public images, so far.
    """

    def __init__(self, config: ContinueConfig, model: Classifier, task: PublicTask) -> None:
        self.config, self.model, self.task = config, model, task
        self.device = model.head.device
        self.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        if not task.shared:
            self.parameters[PUBLIC_HEAD] = model.head.new_zeros(len(model.head), task.classes).detach()
        self.average = {name: value.clone() for name, value in self.parameters.items()}
        self.settings = OptimizerSettings("adam", weight_decay=config.weight_decay)
        self.optimizer = Optimizer(self.settings, self.parameters)
        self.looks: list[Look] = []

    @property
    def public_head(self) -> str:
        """The name of the head that public images are scored by."""
        return "head" if self.task.shared else PUBLIC_HEAD

    @property
    def public_names(self) -> list[str]:
        """The parameters that public gradients are of."""
        return [name for name in self.parameters if name != "head" or self.task.shared]

    @property
    def private_names(self) -> list[str]:
        """The parameters that private gradients are of."""
        return [name for name in self.parameters if name != PUBLIC_HEAD]

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on but the looks: the tensors that steps change, by name."""
        tensors = {f"parameters.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        return tensors | self.optimizer.state

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned; tensors are checked by the caller."""
        restore(self.state(), tensors)

    def loss_of_each(self, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of public views, one by one.

        Args:
            parameters: those of ``public_names``.
            images: uint8 [n, 3, 32, 32]. labels: int64 [n].

        Returns:
            float32 [n].
        """
        prefix = "extractor."
        own = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        extractor = self.model.extractor
        with autocast(extractor, self.device):
            features = functional_call(extractor, own, (extractor.normalise(images),))
        scores = self.model.whitener(features.float()) @ parameters[self.public_head]
        return functional.cross_entropy(scores, labels, reduction="none")

    def public_gradient(self, step: int) -> dict[str, Tensor]:
        """The mean gradient of a batch of public views, drawn by (seed, step)."""
        images, labels = self._on_device(*self.task.batch(step, self.config.public_batch_size))
        leaves = {name: self.parameters[name].detach().requires_grad_() for name in self.public_names}
        loss = self.loss_of_each(leaves, images, labels).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def update(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step of AdamW on some of the parameters; every gradient is of public images, or has its noise."""
        self.optimizer.step(gradients, lr)

    def switch(self) -> None:
        """What changes where private steps begin: the first moment is forgotten, the second and the step count stay
        (Bu et al. 2024); the average starts here."""
        self.optimizer.reset_first_moment()
        for name, value in self.average.items():
            value.copy_(self.parameters[name])

    def average_in(self, private_step: int) -> None:
        """Take the parameters into the average, after private step ``private_step`` (from 0)."""
        decay = min(self.config.ema, (1 + private_step) / (10 + private_step))
        for name, value in self.average.items():
            value.lerp_(self.parameters[name], 1 - decay)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss of the public images that are not trained on."""
        images, labels = self.task.held_out
        own = {name: self.parameters[name] for name in self.public_names}
        total = 0.0
        for start in range(0, len(labels), HELD_OUT_BATCH):
            rows = slice(start, start + HELD_OUT_BATCH)
            total += float(self.loss_of_each(own, *self._on_device(images[rows], labels[rows])).double().sum())
        return total / len(labels)

    def terms(self, step: int, noise_multiplier: float, batch: float) -> LossTerms:
        """The loss terms of a private step from here, estimated on public views; see ``loss_terms.py``."""
        images, labels = self._on_device(*self.task.batch(-1 - step, TERM_EXAMPLES))
        return loss_terms(
            self.loss_of_each,
            {name: self.parameters[name] for name in self.public_names},
            images,
            labels,
            noise_multiplier=noise_multiplier,
            batch=batch,
            probes=TERM_PROBES,
            generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + step),
        )

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.device), labels.to(self.device)
