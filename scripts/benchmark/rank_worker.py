"""``python -m benchmark.rank_worker SCALE ROUNDS`` under ``torchrun``: work by one process and by all, in turn.

Rank 0 does each piece of work alone while the others wait, then with them, A B A B …; every process has one thread.
The result, JSON on stdout: work -> [seconds alone …], [seconds together …], units done in a call.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import torch
from dprandp.dpsgd.followers import serve

from benchmark import finetuning, generator, patchnet
from benchmark.timing import alternate
from dprandp import generate
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import SETTINGS, ClippedSums, SumSettings, shares_of
from dprandp.dpsgd.features import BATCH, extract_by_ranks, tell_model
from dprandp.models.extractor import build_extractor
from dprandp.pretrain import wrn
from dprandp.pretrain.contrastive import ContrastiveTrainer
from dprandp.runs.console import Console
from dprandp.runs.context import prepare_device
from dprandp.runs.parallel import ALONE, Leader, Ranks, join
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
        ranks.ask(generate.RENDER, [({"job": list(job)}, {}) for job in jobs[1:]])
        render_block(*jobs[0])
        ranks.answers()

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
    tell_model(ranks, model.extractor, model.whitener, 10)
    ranks.tell(SETTINGS, vars(settings))

    def by(who: Ranks) -> Callable[[], object]:
        shares = shares_of(who, batch.members.numpy(), batch.images, batch.labels, None)
        return lambda: sums.over_ranks(who, parameters, 0, shares)

    return by(ALONE), by(ranks), batch.records


def steps_of(ranks: Ranks, sizes: dict) -> Sides:
    """Contrastive steps, gradients added up included."""
    config = PretrainConfig(
        arch=sizes["arch"], batch_size=sizes["examples"] * ranks.size, projection_hidden=64, steps=10_000
    )
    pixels, device = generator.images(32, 4 * config.batch_size), torch.device("cpu")
    alone = ContrastiveTrainer(build_extractor(config, torch.Generator().manual_seed(0)), config, pixels)
    network = build_extractor(config, torch.Generator().manual_seed(0))
    stored = ImageSet([pixels.permute(0, 2, 3, 1).numpy()])
    shared = wrn.lead(ranks, network, config, stored, device)
    wrn.begin(shared)
    own, common = iter(range(config.steps)), iter(range(config.steps))
    return lambda: alone.step(next(own)), lambda: shared.step(next(common)), 2 * config.batch_size


WORKS = {"generate": images_of, "extract": features_of, "finetune": sums_of, "pretrain": steps_of}


def main(scale: str, rounds: int) -> None:
    """Serve, or lead and print."""
    met = join()
    if not isinstance(met, Leader):
        os._exit(serve(met, Console(quiet=True)))  # without the goodbyes of libraries to processes that may be gone
    prepare_device("cpu")
    torch.set_num_threads(1)
    results = {}
    try:
        for name, make in WORKS.items():
            alone, together, units = make(met, SIZES[scale])
            samples = alternate({"alone": alone, "together": together}, rounds)
            results[name] = {side: [sample.wall for sample in samples[side]] for side in samples} | {"units": units}
    finally:
        met.end(0)
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
