"""How a WRN or ViT learns in ``pretrain``: steps on two views of each synthetic image, which it learns to map near each
other.

The loop of Tang et al. 2023, Phase I, with the loss of Wang & Isola 2020 (arXiv 2005.10242): alignment and uniformity
on the unit sphere. All randomness of step t is a function of (seed, t), so a state of weights and optimizer resumes
exactly.

Some images, at the ends of their shards, are held out: the features are evaluated on images that were not trained on,
at the end and during the training, rarely enough to cost no more than a few per cent of the time.

*Evaluation of features* is on synthetic images only: no data, no privacy cost. Every image is a class of its own; one
random crop of it is known, another has to be recognised. In addition there are the two quantities of Wang & Isola 2020
and the effective rank of Roy & Vetterli 2007, which need no classes. They detect a collapsed training, but do not
predict accuracy on a particular data set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig, input_size_of, lr_of
from dprandp.errors import UsageError
from dprandp.generate import open_images, read_manifest
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.optimizers import build_optimizer, restore, state_of
from dprandp.models.precision import autocast
from dprandp.models.wrn import GROUPS, flat, initialise
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import check_tensors
from dprandp.runs.console import MetricsLog
from dprandp.runs.context import Context
from dprandp.runs.parallel import ALONE, Ranks
from dprandp.runs.results import Measures
from dprandp.runs.signals import Stop
from dprandp.vision.images import ImageSet, random_crops
from dprandp.vision.views import ContrastiveViews, ViewChoices


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """mean ‖x_i - y_i‖² over the pairs of vectors [B, D], scaled to unit length: float32 scalar in [0, 4].

    In float32 under autocast too, as ``uniformity``: small differences of products need more than eight bits.
    """
    with torch.autocast(x.device.type, enabled=False):
        return (_unit(x) - _unit(y)).square().sum(dim=1).mean()


def uniformity(x: Tensor) -> Tensor:
    """log mean_{i<j} exp(-2 ‖x_i - x_j‖²) over the pairs of vectors [B, D], scaled to unit length: float32 in [-8, 0].

    0 when all vectors coincide, about -4 when they cover a sphere of many dimensions.

    Raises:
        UsageError: fewer than two vectors.
    """
    if len(x) < 2:
        raise UsageError("uniformity needs at least two vectors", fix="use a batch of 2 or more")
    with torch.autocast(x.device.type, enabled=False):
        unit = _unit(x)
        # ‖a - b‖² = 2 - 2 a·b for unit vectors, so -2‖a - b‖² = 4 a·b - 4; the diagonal is taken out
        exponents = (4 * (unit @ unit.T) - 4).fill_diagonal_(-math.inf)
        return torch.logsumexp(exponents.flatten(), dim=0) - math.log(len(x) * (len(x) - 1))


def align_uniformity(x: Tensor, y: Tensor) -> Tensor:
    """The contrastive loss of Phase I: alignment(x, y) + (uniformity(x) + uniformity(y)) / 2.

    Args:
        x, y: embeddings [B, D] of the two views of the same B >= 2 images, of any floating dtype and any length.
    """
    return alignment(x, y) + (uniformity(x) + uniformity(y)) / 2


def _unit(x: Tensor) -> Tensor:
    # The floor makes a zero vector stay zero with a zero gradient of finite size, where 0/0 would poison the batch.
    return F.normalize(x.float(), dim=1, eps=1e-8)


class ProjectionHead(nn.Module):
    """The head of contrastive pretraining (Tang et al. 2023), thrown away afterwards, but for a ``first`` layer.

    flatten -> Linear -> GroupNorm -> ReLU -> Linear -> GroupNorm -> ReLU -> Linear. No pooling before it. The first two
    layers have no bias, for GroupNorm follows. The loss brings the embedding to unit length.

    Args:
        input_dim: size of a flattened feature map, 16384 for WRN-16-4.
        hidden_dim: published 4096, which is 84 million weights; 256 to 512 is enough for small networks.
        embedding_dim: published 128.
        first: the first layer, where another module has it.

    Raises:
        UsageError: the 16 groups of a norm do not divide hidden_dim.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        hidden_dim: int = 4096,
        embedding_dim: int = 128,
        first: nn.Linear | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim % GROUPS:
            raise UsageError(
                f"a projection head of {hidden_dim} hidden units has no {GROUPS} groups",
                fix=f"give a multiple of {GROUPS}",
            )
        self._of_another = () if first is None else (first,)  # a tuple: no submodule
        self.linear1 = None if first is not None else nn.Linear(input_dim, hidden_dim, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, hidden_dim)
        self.linear3 = nn.Linear(hidden_dim, embedding_dim)
        initialise(self, generator)

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] -> embedding [B, embedding_dim], not normalised."""
        (first,) = self._of_another or (self.linear1,)
        hidden = F.relu(self.norm1(first(flat(feature_map))))
        return self.linear3(F.relu(self.norm2(self.linear2(hidden))))


STEP_SCHEDULE = (155 / 200, 170 / 200, 185 / 200)
"""Published: learning rate x 0.1 after these fractions of the training."""

LOG_EVERY = 10
"""Steps between two mean losses."""


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Learning rate of a step, 0-based: 'cosine' to zero after a warm-up of 5 %, or 'step' as published."""
    progress, lr = step / config.steps, lr_of(config)
    if config.schedule == "step":
        return lr * 0.1 ** sum(progress >= boundary for boundary in STEP_SCHEDULE)
    warm_up = min(1.0, (step + 1) / max(1.0, 0.05 * config.steps))
    return lr * warm_up * 0.5 * (1 + math.cos(math.pi * progress))


class ContrastiveTrainer:
    """Network, projection head and optimizer of Phase I, one ``step`` at a time.

    The loss compares all embeddings of a batch with one another. With several ranks, each embeds its share of the
    images; the embeddings are gathered everywhere; each rank takes the whole batch's loss and follows its gradient
    through its own embeddings alone. The sum of the ranks' gradients is that of one process with the same batch, as
    every embedding belongs to one rank. The ranks begin with the same state and add the same bits, so they stay equal.

    Args:
        network: with ``trunk`` and ``normalise``; trained in place.
        config: steps, batch_size, optimizer, lr, momentum, weight_decay, schedule, projection_*.
        images: uint8 [N, 3, R, R] synthetic, on the device that trains; only those of a step are copied.
        ranks: that share the batches.
    """

    def __init__(
        self, network: nn.Module, config: PretrainConfig, images: ImageSet | Tensor, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.images, self.device, self.ranks = config, images, images.device, ranks
        self.network = network.to(self.device, memory_format=torch.channels_last)
        with torch.no_grad():
            side = input_size_of(config)
            probe = torch.zeros(1, 3, side, side, device=self.device)
            places = self.network.trunk(probe).numel()
        self.head = ProjectionHead(
            places,
            hidden_dim=config.projection_hidden,
            embedding_dim=config.projection_dim,
            first=getattr(network, "projection", None),
            generator=torch.Generator().manual_seed(config.seed + 1),
        ).to(self.device)
        self.views = ContrastiveViews(input_size_of(config))
        self.window: list[Tensor] = []  # losses since the last mean
        parts = {"network": self.network, "head": self.head}
        named = [(f"{part}.{name}", p) for part, module in parts.items() for name, p in module.named_parameters()]
        self.optimizer = build_optimizer(config, named)

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
            len(self.images), (self.config.batch_size,), generator=generator, device=self.device
        )  # with replacement: an image more or less often costs nothing, and no epoch has to be remembered
        like = torch.empty((), dtype=torch.uint8, device=self.device)  # a draw looks at shapes alone
        like = like.expand(len(chosen), *self.images.shape[1:])
        return chosen, self.views.draw(like, generator), self.views.draw(like, generator)

    def backward(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> Tensor:
        """Leave the gradient of the loss of a batch in the parameters, on all ranks; returns the loss."""
        ranks = self.ranks
        if ranks.size == 1:
            loss = align_uniformity(*self.embed(chosen, first, second))
            loss.backward()
            return loss.detach()
        shares = ranks.shares(len(chosen))
        mine = shares[ranks.rank]
        own = torch.cat(self.embed(chosen[mine], first.rows(mine), second.rows(mine)), dim=1).float()
        parts = ranks.gather(own.detach(), [share.stop - share.start for share in shares], everywhere=True)
        parts[ranks.rank] = own  # the same values, with their gradient
        loss = align_uniformity(*torch.cat(parts).chunk(2, dim=1))
        loss.backward()
        parameters = [*self.network.parameters(), *self.head.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # not those unused
        total = torch.cat([gradient.flatten() for gradient in gradients])
        ranks.all_reduce(total)
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return loss.detach()

    def embed(self, chosen: Tensor, first: ViewChoices, second: ViewChoices) -> tuple[Tensor, Tensor]:
        """Embeddings [b, projection_dim] of the two views of some images, with a gradient."""
        images = self.images[chosen]
        views = torch.cat([self.views.apply(images, first), self.views.apply(images, second)])
        with autocast(self.network, self.device):
            both = self.network.normalise(views).to(memory_format=torch.channels_last)
            x, y = self.head(self.network.trunk(both)).chunk(2)  # published: without the final activation
        return x, y

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

    def agree(self) -> None:
        """Give every rank the state of rank 0."""
        state = self.state()
        self.ranks.broadcast(state.values())
        if not self.ranks.is_first:
            self.load_state(state)


def train(trainer: ContrastiveTrainer, first_step: int, *, on_step: Callable[[int, float | None], None]) -> float:
    """Run the steps from ``first_step`` to the end of the configuration; returns the last mean loss.

    Args:
        trainer: with the state that ``first_step`` needs.
        first_step: 0 for a fresh start.
        on_step: called after every step with the number of steps done and, every ``LOG_EVERY`` steps, the mean loss
            since the last time (None otherwise: reading it would make an accelerator wait).
    """
    mean = math.nan
    for step in range(first_step, trainer.config.steps):
        trainer.window.append(trainer.step(step))
        done = step + 1
        if done % LOG_EVERY == 0 or done == trainer.config.steps:
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


# ----------------------------------------------------------------------------------------------------------- evaluation

RIDGE = 1e-3
"""Ridge of the linear classifier, relative to the mean of the squared singular values."""

MEASURES = tuple(field.name for field in fields(Measures))


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor | ImageSet, generator: torch.Generator) -> Measures:
    """Evaluate an extractor by two random crops of each image, uint8 [n, 3, R, R] synthetic, n >= 2, on the CPU.

    Returns:
        knn_accuracy: of second crops by the nearest first crop, cosine similarity; chance is 1/n.
        linear_accuracy: of second crops by a ridge regression on the first ones; chance is 1/n.
        alignment: mean squared distance between the two crops' features, on the unit sphere, in [0, 4].
        uniformity: log mean exp(-2 squared distance) of different images' features, in [-8, 0]; lower is more spread.
        effective_rank: see ``effective_rank``.
        All of features minus the mean of the first crops', rounded to four digits.
    """
    training = network.training
    network.eval()
    crops = (random_crops(images, network.input_size, generator) for _ in range(2))
    first, second = (extract(network, each, mirror=False) for each in crops)
    network.train(training)
    centre = first.mean(dim=0)
    first, second = first - centre, second - centre
    return Measures(
        knn_accuracy=round(nearest_accuracy(first, second), 4),
        linear_accuracy=round(linear_accuracy(first, second), 4),
        alignment=round(float(alignment(first, second)), 4),
        uniformity=round(float(uniformity(first)), 4),
        effective_rank=round(effective_rank(torch.cat([first, second])), 4),
    )


def nearest_accuracy(first: Tensor, second: Tensor) -> float:
    """Fraction of rows of ``second`` whose nearest row of ``first``, by cosine similarity, is that of the same
    position.

    Both are float [n, D]; a row of zeros has similarity 0 to everything.
    """
    similarity = F.normalize(second, dim=1) @ F.normalize(first, dim=1).T
    return float((similarity.argmax(dim=1) == torch.arange(len(first))).float().mean())


def effective_rank(features: Tensor) -> float:
    """exp of the entropy (nats) of the covariance's eigenvalues, as fractions of their sum, for features [n, D], n >=
    2.

    From 1 (all variance along one direction) to min(n - 1, D) (equal along all); 0 where nothing varies.
    """
    centred = (features - features.mean(dim=0)).double()
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    if not values.sum() > 0:
        return 0.0
    parts = values / values.sum()
    return float(torch.special.entr(parts).sum().exp())


def linear_accuracy(features: Tensor, test_features: Tensor) -> float:
    """Fraction of test rows for which a linear classifier finds the training row of the same position.

    Every row is a class. The classifier is the ridge regression of one-hot labels on standardised features, without
    intercept, solved in its dual form: n equations.

    Args:
        features, test_features: float [n, D], about centred.
    """
    deviation = features.std(dim=0)
    scale = 1 / (deviation + 1e-3 * deviation.mean() + 1e-12)
    known, asked = (features * scale).double(), (test_features * scale).double()
    gram = known @ known.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    one_hot = torch.eye(len(features), dtype=torch.float64)
    scores = asked @ known.T @ torch.linalg.solve(gram, one_hot)
    return float((scores.argmax(dim=1) == torch.arange(len(features))).double().mean())


# --------------------------------------------------------------------------------------------------- the whole training

STAGE = "pretrain"

HELD_OUT = 400
"""Most images that are held out for the evaluation; a quarter of all, where there are few."""

WATCHED = 128
"""Of them, those that are evaluated during the training."""

WATCHING_FRACTION = 0.04
"""Of the work, for these evaluations: a view costs a third of one that is trained on."""

MOST_LOOKS = 50


@dataclass(frozen=True)
class Learned:
    """A network that has been learned."""

    network: nn.Module
    views_per_second: float | None  # None: no step was left
    loss: float | None  # mean of the last steps; None where nothing was trained by gradients


def learn(config: PretrainConfig, context: Context, stop: Stop) -> Learned:
    """Train from the last checkpoint to the end of the configuration; rank 0 writes checkpoints and metrics.jsonl.

    Raises:
        UsageError: settings that cannot be met. CheckpointError: one of another configuration.
    """
    folder, ranks = context.rundir.stage_dir(STAGE), context.ranks
    trainer = begun_trainer(config, context)
    first_step, loss = ranks.first(lambda: _resume(trainer, context))
    trainer.agree()
    if not ranks.is_first:
        return Learned(trainer.network, None, train(trainer, first_step, on_step=lambda done, mean: None))
    log = MetricsLog(folder / "metrics.jsonl", first_step + 1 if first_step else 0)
    watched = held_out_images(context).head(WATCHED)
    every = steps_between_looks(config)
    looked = ""
    started = time.perf_counter()
    with context.console.progress(config.steps, "pretraining steps", done=first_step) as progress:

        def save(done: int) -> None:
            meta = {"step": done, "loss": loss, "window": [float(value) for value in trainer.window]}
            checkpoint.save(folder, f"step-{done:07d}", trainer.state(), meta)

        def on_step(done: int, mean_loss: float | None) -> None:
            nonlocal loss, looked
            if mean_loss is not None:
                loss = mean_loss
                log.write(step=done, loss=mean_loss)
            if done % every == 0 and len(watched) and done < config.steps:
                seen = evaluate(trainer.network, watched, torch.Generator().manual_seed(config.seed))
                log.write(step=done, **vars(seen))
                looked = f", k-NN {100 * seen.knn_accuracy:.0f} % (synthetic), rank {seen.effective_rank:.0f}"
            progress.advance(1, "" if loss is None else f"loss {loss:.3g}{looked}")
            stop.end_step(done % config.checkpoint_every == 0 and done < config.steps, lambda: save(done))

        loss = train(trainer, first_step, on_step=on_step) if first_step < config.steps else loss
    done = config.steps - first_step
    rate = 2 * config.batch_size * done / (time.perf_counter() - started) if done else None
    return Learned(trainer.network, round(rate, 1) if rate else None, round(loss, 5))


def _resume(trainer: ContrastiveTrainer, context: Context) -> tuple[int, float | None]:
    """Load the last checkpoint, if there is one: the step to go on from, and the last mean loss if there was any."""
    saved = checkpoint.resume(context.rundir.stage_dir(STAGE), warn=context.console.warn)
    if saved is None:
        return 0, None
    check_tensors(saved.tensors, trainer.state(), saved.path)
    trainer.load_state(saved.tensors)
    trainer.window = [torch.tensor(value, device=context.device) for value in saved.entry("window", list)]
    step = saved.entry("step", int)
    context.console.say(f"pretrain: going on at step {step} of {trainer.config.steps}")
    return step, saved.meta.get("loss")


def steps_between_looks(config: PretrainConfig) -> int:
    """Steps between two evaluations: ``WATCHING_FRACTION`` of the work, and no more than ``MOST_LOOKS`` of them."""
    looked = 2 * WATCHED / 3
    return max(math.ceil(looked / (WATCHING_FRACTION * 2 * config.batch_size)), math.ceil(config.steps / MOST_LOOKS))


def held_out_images(context: Context) -> ImageSet:
    """The images that no WRN is trained on. A dictionary of patches takes a few patches of these too."""
    return ImageSet(open_images(context.rundir.stage_dir("generate"), _held_out(context), from_end=True))


def _held_out(context: Context) -> int:
    total = read_manifest(context.rundir.stage_dir("generate")).count
    held = min(HELD_OUT, total // 4)
    return held if held >= 2 else 0


def begun_trainer(config: PretrainConfig, context: Context) -> ContrastiveTrainer:
    """The trainer as the configuration begins it."""
    network = build_extractor(config, torch.Generator().manual_seed(config.seed))
    shards = open_images(context.rundir.stage_dir("generate"), without_end=_held_out(context))
    images = ImageSet(shards, config.colour).to(context.device)
    return ContrastiveTrainer(network, config, images, context.ranks)
