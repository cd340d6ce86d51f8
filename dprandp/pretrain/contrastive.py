"""Pretraining of a network on two views of each synthetic image, which it learns to map near each other.

The loop of Tang et al. 2023, Phase I: two views of each image and a projection head that is thrown away afterwards. All
randomness of step t is a function of (seed, t), so a state of weights and optimizer resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional

from dprandp.config.schema import PretrainConfig, lr_of
from dprandp.errors import UsageError
from dprandp.models.optimizers import build_optimizer, restore, state_of
from dprandp.models.precision import autocast
from dprandp.models.wrn import initialise
from dprandp.vision.images import INPUT_SIZE, ImageSet
from dprandp.vision.views import ContrastiveViews, ViewChoices

# -------------------------------------------------------------------------------------------------------------- losses
#
# Alignment and uniformity on the unit sphere: the contrastive loss of DP-RandP's Phase I (Wang & Isola 2020).
#
# arXiv 2005.10242. Everything is computed in float32, under autocast too: the losses are small differences of products,
# which eight bits of mantissa cannot hold.


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """mean ‖x_i - y_i‖² over the pairs of unit vectors.

    Args:
        x, y: [B, D] of any floating dtype and any length; they are scaled to unit length here.

    Returns:
        float32 scalar in [0, 4]; 0 when both views of every image agree.
    """
    _check_pair(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return (_unit(x) - _unit(y)).square().sum(dim=1).mean()


def uniformity(x: Tensor) -> Tensor:
    """log mean_{i<j} exp(-2 ‖x_i - x_j‖²) over the pairs of unit vectors.

    Args:
        x: [B, D] with B >= 2, of any floating dtype and any length; scaled to unit length here.

    Returns:
        float32 scalar in [-8, 0]; 0 when all vectors coincide, about -4 when they cover a sphere of many dimensions.

    Raises:
        UsageError: fewer than two vectors, or not a matrix.
    """
    _check_two(x)
    with torch.autocast(x.device.type, enabled=False):
        unit = _unit(x)
        # ‖a - b‖² = 2 - 2 a·b for unit vectors, so -2‖a - b‖² = 4 a·b - 4. The pairs i > j repeat the pairs i < j and
        # leave the mean as it is; the diagonal is taken out.
        exponents = (4 * (unit @ unit.T) - 4).fill_diagonal_(-math.inf)
        return torch.logsumexp(exponents.flatten(), dim=0) - math.log(len(x) * (len(x) - 1))


def align_uniformity(x: Tensor, y: Tensor) -> Tensor:
    """The contrastive loss of Phase I: alignment(x, y) + (uniformity(x) + uniformity(y)) / 2.

    Args:
        x, y: embeddings [B, D] of the two views of the same B >= 2 images, normalised or not.

    Returns:
        float32 scalar with a gradient.

    Raises:
        UsageError: shapes that differ, fewer than two pairs.
    """
    return alignment(x, y) + (uniformity(x) + uniformity(y)) / 2


def _unit(x: Tensor) -> Tensor:
    # The floor makes a zero vector stay zero with a zero gradient of finite size, where 0/0 would poison the batch.
    return F.normalize(x.float(), dim=1, eps=1e-8)


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 2 or len(x) < 1:
        raise UsageError(
            f"the two views' embeddings have shapes {tuple(x.shape)} and {tuple(y.shape)}",
            fix="pass two matrices [B, D] of the same shape",
        )


def _check_two(x: Tensor) -> None:
    if x.ndim != 2 or len(x) < 2:
        raise UsageError(
            f"uniformity needs at least two vectors [B, D], got shape {tuple(x.shape)}",
            fix="use a batch of 2 or more",
        )


# ----------------------------------------------------------------------------------------------------- projection head
#
# The projection head of contrastive pretraining (Tang et al. 2023).

class ProjectionHead(nn.Module):
    """The head of contrastive pretraining, thrown away afterwards: flatten, two hidden layers, a linear embedding.

    flatten -> Linear -> GroupNorm -> ReLU -> Linear -> GroupNorm -> ReLU -> Linear. No pooling before it. The first two
    layers have no bias, for GroupNorm follows. The embedding is not of unit length: the loss normalises it.

    Args:
        input_dim: size of a flattened feature map, ``map_channels · 8 · 8`` for 32×32 images (16384 for WRN-16-4).
        hidden_dim: published 4096, which is 84 million weights; 256 to 512 is enough for small networks.
        embedding_dim: published 128.
        norm_groups: must divide hidden_dim.
        generator: of the initial weights; None means torch's global one.

    Raises:
        UsageError: a size below 1, or norm_groups does not divide hidden_dim.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        hidden_dim: int = 4096,
        embedding_dim: int = 128,
        norm_groups: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (input_dim, hidden_dim, embedding_dim, norm_groups)
        if min(sizes) < 1 or hidden_dim % norm_groups:
            raise UsageError(
                f"projection head sizes {sizes} (input, hidden, embedding, groups) do not fit",
                fix="use positive sizes and a hidden size that the number of groups divides",
            )
        self.linear1 = nn.Linear(input_dim, hidden_dim, bias=False)
        self.norm1 = nn.GroupNorm(norm_groups, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, hidden_dim)
        self.linear3 = nn.Linear(hidden_dim, embedding_dim)
        initialise(self, generator)

    def first_layer(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] or [B, input_dim] -> [B, hidden_dim], >= 0: the features of the published probe baseline."""
        # contiguous() first: flatten must list channel, row, column whatever the memory format
        return F.relu(self.norm1(self.linear1(feature_map.contiguous().flatten(1))))

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] or [B, input_dim] -> embedding [B, embedding_dim], not normalised."""
        return self.linear3(F.relu(self.norm2(self.linear2(self.first_layer(feature_map)))))


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
        config: steps, batch_size, optimizer, lr, momentum, weight_decay, schedule, projection_*.
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
