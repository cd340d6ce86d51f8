"""Pretraining of a network on two views of each synthetic image, which it learns to map near each other.

The loop of Tang et al. 2023, Phase I: two views of each image and a projection head that is thrown away afterwards. All
randomness of step t is a function of (seed, t), so a state of weights and optimizer resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprandp.config import PretrainConfig
from dprandp.pretrain_config import lr_of
from dprandp.vision.image_set import ImageSet
from dprandp.vision.images import INPUT_SIZE
from dprandp.vision.losses import align_uniformity
from dprandp.vision.optimizers import build_optimizer, restore, state_of
from dprandp.vision.precision import autocast
from dprandp.vision.projection_head import ProjectionHead
from dprandp.vision.views import ContrastiveViews, ViewChoices

STEP_SCHEDULE = (155 / 200, 170 / 200, 185 / 200)
"""Published: learning rate x 0.1 after these parts of the training."""


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of a step, 0-based: 'cosine' to zero after a warm-up of 5 %, or 'step' as published."""
    progress, lr = step / config.steps, lr_of(config)
    if config.schedule == "step":
        return lr * 0.1 ** sum(progress >= boundary for boundary in STEP_SCHEDULE)
    warm_up = min(1.0, (step + 1) / max(1.0, 0.05 * config.steps))
    return lr * warm_up * 0.5 * (1 + math.cos(math.pi * progress))


class ContrastiveTrainer:
    """Network, projection head and optimizer of Phase I, one ``step`` at a time.

    Args:
        network: a WRN with ``trunk`` and ``normalise``; trained in place.
        config: steps, batch_size, optimizer, lr, momentum, weight_decay, schedule, grow, projection_*.
        images: uint8 [N, 3, R, R] synthetic, on the device that trains; only those of a step are copied.

    Attributes:
        count: of images to choose from.
    """

    def __init__(self, network: nn.Module, config: PretrainConfig, images: ImageSet | Tensor) -> None:
        self.config, self.images, self.device, self.count = config, images, images.device, len(images)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self._map = self._map_shape()
        self.head = ProjectionHead(
            math.prod(self._map),
            hidden_dim=config.projection_hidden,
            embedding_dim=config.projection_dim,
            generator=torch.Generator().manual_seed(config.seed + 1),
        ).to(self.device)
        self.views = ContrastiveViews(INPUT_SIZE)
        self.window: list[Tensor] = []  # losses since the last mean; part of the state that a checkpoint keeps
        parts = {"network": self.network, "head": self.head}
        named = [(f"{part}.{name}", p) for part, module in parts.items() for name, p in module.named_parameters()]
        self.optimizer = build_optimizer(config, named)

    @torch.no_grad()
    def _map_shape(self) -> tuple[int, ...]:
        probe = torch.zeros(1, 3, INPUT_SIZE, INPUT_SIZE, device=self.device)
        return tuple(self.network.trunk(probe).shape[1:])

    def step(self, step: int) -> Tensor:
        """One update on two views of a batch; returns the loss (a 0-d tensor, not yet synchronised)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.zero_grad(set_to_none=True)
        small = self.config.grow and 2 * step < self.config.steps
        self.views.size = INPUT_SIZE // 2 if small else INPUT_SIZE
        loss = self.backward(*self.draw(step))
        self.optimizer.step()
        return loss

    def draw(self, step: int) -> tuple[Tensor, ViewChoices, ViewChoices]:
        """A step's images, int64 [batch_size], and the choices of their two views; a function of (seed, step)."""
        generator = torch.Generator(self.device).manual_seed(_step_seed(self.config.seed, step))
        chosen = torch.randint(
            self.count, (self.config.batch_size,), generator=generator, device=self.device
        )  # with replacement: an image more or less often costs nothing, and no epoch has to be remembered
        like = torch.empty((), dtype=torch.uint8, device=self.device)  # a draw looks at shapes alone
        like = like.expand(len(chosen), *self.images.shape[1:])
        return chosen, self.views.draw(like, generator), self.views.draw(like, generator)

    def backward(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> Tensor:
        """Leave the gradient of the loss of a batch in the parameters; returns the loss."""
        loss = align_uniformity(*self.embed(chosen, first, second))
        loss.backward()
        return loss.detach()

    def embed(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> tuple[Tensor, Tensor]:
        """Embeddings [b, projection_dim] of the two views of some images, with a gradient."""
        images = self.images[chosen]
        views = torch.cat([self.views.apply(images, first), self.views.apply(images, second)])
        with autocast(self.network, self.device):
            x, y = self._through_network(views).chunk(2)
        return x, y

    def _through_network(self, views: Tensor) -> Tensor:
        both = self.network.normalise(views).to(memory_format=torch.channels_last)
        feature_map = self.network.trunk(both)  # published: without the final activation
        if feature_map.shape[1:] != self._map:  # of small views; the head has a weight for every place
            feature_map = functional.interpolate(feature_map, self._map[1:], mode="nearest")
        return self.head(feature_map)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as named tensors."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        tensors |= state_of(self.optimizer)
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""
        self.network.load_state_dict(_with_prefix(tensors, "network."))
        self.head.load_state_dict(_with_prefix(tensors, "head."))
        restore(state_of(self.optimizer), tensors)


def train(
    trainer: ContrastiveTrainer,
    first_step: int,
    *,
    on_step: Callable[[int, float | None], None],
    log_every: int = 10,
) -> float:
    """Run the steps from ``first_step`` to the end of the configuration.

    Args:
        trainer: with the state that ``first_step`` needs.
        first_step: 0 for a fresh start.
        on_step: called after every step with the number of steps done and, every ``log_every`` steps, the mean loss
            since the last time (None otherwise: reading it would make an accelerator wait).

    Returns:
        The mean loss of the last ``log_every`` steps.
    """
    mean = math.nan
    for step in range(first_step, trainer.config.steps):
        trainer.window.append(trainer.step(step))
        done = step + 1
        if done % log_every == 0 or done == trainer.config.steps:
            mean = float(torch.stack(trainer.window).mean())
            trainer.window.clear()
            on_step(done, mean)
        else:
            on_step(done, None)
    return mean


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 7_919 + 17) % 2**63


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
