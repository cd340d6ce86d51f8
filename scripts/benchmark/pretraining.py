"""Phase I, contrastive training: a whole step against nothing but forward and backward of the same networks.

Both sides have the same network, projection head and precision; the pure side has its views ready, normalised and in
the memory format that is faster, has no loss to speak of and makes no update: what it takes is the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmark import generator
from benchmark.cases import OURS, Case, Comparison, Limit, Side
from benchmark.pairs import agree
from dprandp.config.schema import PretrainConfig
from dprandp.models.extractor import build_extractor
from dprandp.models.precision import AUTO, BFLOAT16, FLOAT32, autocast, decide
from dprandp.pretrain.contrastive import ContrastiveTrainer

PURE = "forward and backward alone"

SIZES = {  # architecture, images of a step (two views each), hidden size of the head, resolution of the images
    "full": ("wrn-16-4", 64, 1024, 64),
    "quick": ("wrn-16-4", 8, 256, 64),
    "tiny": ("wrn-10-1", 4, 16, 32),
}


def case(scale: str) -> Case:
    """``ContrastiveTrainer.step`` against the pure rate."""
    arch, batch, hidden, resolution = SIZES[scale]
    precision = decide(AUTO, "cpu") if scale == "full" else FLOAT32
    config = PretrainConfig(
        arch=arch, batch_size=batch, projection_hidden=hidden, steps=10_000, precision=precision
    )

    def trainer() -> ContrastiveTrainer:
        network = build_extractor(config, torch.Generator().manual_seed(0))
        return ContrastiveTrainer(network, config, generator.images(resolution, 2 * batch))

    def ready(made: ContrastiveTrainer) -> Tensor:
        chosen, first, second = made.draw(0)
        views = torch.cat([made.views.apply(made.images[chosen], each) for each in (first, second)])
        return made.network.normalise(views).to(memory_format=torch.channels_last)

    def embedding(made: ContrastiveTrainer, views: Tensor) -> Tensor:
        with autocast(made.network, made.device):
            return made.head(made.network.trunk(views))

    def steps() -> Callable[[], object]:
        made, number = trainer(), iter(range(config.steps))
        return lambda: made.step(next(number))

    def pure():
        made = trainer()
        views = ready(made)

        def work() -> None:
            made.optimizer.zero_grad(set_to_none=True)
            embedding(made, views).float().square().mean().backward()

        return work

    def check() -> Mapping[str, float]:
        made, tolerance = trainer(), 2e-2 if precision == BFLOAT16 else 1e-4
        with torch.no_grad():
            embedded = torch.cat(made.embed(*made.draw(0)))
            return {PURE: agree(PURE, embedded, embedding(made, ready(made)), tolerance)}

    return Case(
        ours=Side(OURS, steps, 2 * batch),
        others=(Side(PURE, pure, 2 * batch),),
        comparisons=(Comparison(PURE, "× the rate", target=Limit(0.9)),),
        check=check,
        sizes=f"{arch}, {2 * batch} views of {resolution} px images, head {hidden}, {precision}",
        unit="view",
    )
