"""``python -m benchmark.rank_worker SCALE ROUNDS`` under ``torchrun``: work by one process and by all, in turn.

Rank 0 does each piece of work alone while the others wait, then all do it, A B A B …; every process has one thread.
The result, JSON on stdout: work -> [seconds alone …], [seconds together …], units done in a call.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable

import torch

from benchmark import finetuning, generator, patchnet
from benchmark.timing import alternate
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, share_of
from dprandp.dpsgd.features import BATCH, extract_by_ranks
from dprandp.models.extractor import build_extractor
from dprandp.pretrain.contrastive import ContrastiveTrainer
from dprandp.runs.context import prepare_device
from dprandp.runs.parallel import ALONE, Ranks, join
from dprandp.synth import render_block
from dprandp.vision.images import ImageSet

Sides = tuple[Callable[[], object], Callable[[], object], float]
"""Alone, together, units of a call."""

SIZES = {  # generate: images of a shard, resolution; extract: filters, batches; the rest: arch, examples a rank, views
    "full": {
        "shard": 100, "resolution": 64, "filters": 800, "batches": 4, "arch": "wrn-16-4", "examples": 8, "views": 4,
    },
    "tiny": {"shard": 4, "resolution": 8, "filters": 16, "batches": 2, "arch": "wrn-10-1", "examples": 4, "views": 2},
}  # fmt: skip


def images_of(ranks: Ranks, sizes: dict) -> Sides:
    """A round of shards of stylegan-oriented, as ``generate`` shares them out."""
    jobs = [("stylegan-oriented", 0, block, sizes["shard"], sizes["resolution"]) for block in range(ranks.size)]

    def together() -> None:
        images = torch.from_numpy(render_block(*jobs[ranks.rank]))
        ranks.gather(images, [sizes["shard"]] * ranks.size)

    return lambda: [render_block(*job) for job in jobs], together, sizes["shard"] * ranks.size


def features_of(ranks: Ranks, sizes: dict) -> Sides:
    """PatchNet features, as the probe extracts them."""
    net = build_extractor(PretrainConfig(filters=sizes["filters"]), torch.Generator().manual_seed(0))
    count = sizes["batches"] * BATCH  # whole batches are what is shared out
    pixels = patchnet.pixels(count, 3, 32, 32)

    def by(who: Ranks) -> Callable[[], object]:
        return lambda: extract_by_ranks(who, net, pixels, None, False, lambda done: None)

    return by(ALONE), by(ranks), count


def sums_of(ranks: Ranks, sizes: dict) -> Sides:
    """Clipped sums of the fine-tune, parameters sent out included."""
    bench = finetuning.Bench(finetuning.Shape(sizes["arch"], sizes["examples"] * ranks.size, sizes["views"]))
    model, batch = bench.model(), bench.batch
    settings = SumSettings(1.0, sizes["views"], 0, True, finetuning.CLIP_NORM)
    sums, parameters = ClippedSums(model, settings), {n: p.detach().clone() for n, p in model.named_parameters()}

    def by(who: Ranks) -> Callable[[], object]:
        share = share_of(who, batch.members.numpy(), batch.images, batch.labels, None)
        return lambda: sums.over_ranks(who, parameters, 0, share)

    return by(ALONE), by(ranks), batch.records


def steps_of(ranks: Ranks, sizes: dict) -> Sides:
    """Contrastive steps, gradients added up included."""
    config = PretrainConfig(
        arch=sizes["arch"], batch_size=sizes["examples"] * ranks.size, projection_hidden=64, steps=10_000
    )
    pixels = generator.images(32, 4 * config.batch_size)
    stored = ImageSet([pixels.permute(0, 2, 3, 1).numpy()])
    alone, shared = (
        ContrastiveTrainer(build_extractor(config, torch.Generator().manual_seed(0)), config, stored, who)
        for who in (ALONE, ranks)
    )
    own, common = iter(range(config.steps)), iter(range(config.steps))
    return lambda: alone.step(next(own)), lambda: shared.step(next(common)), 2 * config.batch_size


WORKS = {"generate": images_of, "extract": features_of, "finetune": sums_of, "pretrain": steps_of}


def main(scale: str, rounds: int) -> None:
    """Measure, as one of the ranks; rank 0 prints."""
    ranks = join()
    prepare_device("cpu")
    torch.set_num_threads(1)
    results = {}
    for name, make in WORKS.items():
        alone, together, units = make(ranks, SIZES[scale])
        if not ranks.is_first:
            while len(ranks.broadcast_rows(None)):  # rank 0 decides how often
                together()
            continue
        again, enough = torch.ones(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        by_all = functools.partial(lambda work, ranks, row: (ranks.broadcast_rows(row), work()), together, ranks, again)
        samples = alternate({"alone": alone, "together": by_all}, rounds)
        ranks.broadcast_rows(enough)
        results[name] = {side: [sample.wall for sample in samples[side]] for side in samples} | {"units": units}
    if ranks.is_first:
        print(json.dumps(results), flush=True)
    ranks.refuse_different("end", lambda: "00")  # all leave together
    sys.stdout.flush()
    os._exit(0)  # no shutdown hooks of libraries: they may wait for lost processes


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
