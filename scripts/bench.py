#!/usr/bin/env python3
"""Speed of the parts as ratios against the plain way to do the same, A B A B ... in one run.

    make bench        or        python scripts/bench.py --rounds 5 --json

Every pair computes the same numbers, which is checked first. Ratios (plain time / our time) are given as median and
range over the rounds; seconds alone mean little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch.nn import functional

from dprandp.privacy.clipping import clipped_softmax_sum, clipped_sum, per_example_gradients
from dprandp.stages.clipped_sums import loss_function
from dprandp.vision import whitening
from dprandp.vision.classifier import Classifier
from dprandp.vision.patchnet import PatchNet
from dprandp.vision.patchnet_gradients import per_example_gradients as closed_form_gradients

Work = Callable[[], object]


def main() -> None:
    """Measure every pair and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    rows = [compare(name, ours, plain, args.rounds) for name, ours, plain in (probe_step(), extraction(), gradients())]
    facts = {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({**facts, "pairs": rows}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for row in rows:
        print(f"{row['pair']}: {row['ratio']:.1f}x ({row['lowest']:.1f}-{row['highest']:.1f}), {row['seconds']:.3g} s")


def compare(name: str, ours: Work, plain: Work, rounds: int) -> dict:
    """Time two ways in turn, after one uncounted round."""
    ratios, seconds = [], []
    for turn in range(rounds + 1):
        mine, theirs = timed(ours), timed(plain)
        if turn:
            ratios.append(theirs / mine)
            seconds.append(mine)
    return {
        "pair": name,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": statistics.median(seconds),
    }


def timed(work: Work) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def probe_step() -> tuple[str, Work, Work]:
    """A full-batch clipped gradient of a linear head: closed form against vmap(grad) over the examples."""
    generator = torch.Generator().manual_seed(0)
    features = functional.normalize(torch.randn(5000, 2048, generator=generator), dim=1)
    labels = torch.randint(10, (5000,), generator=generator)
    head = torch.randn(2048, 10, generator=generator)

    def loss(parameters: dict, example: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(example @ parameters["head"], label[None])

    def plain() -> torch.Tensor:
        total = torch.zeros(2048, 10, dtype=torch.float64)
        for part in per_example_gradients(loss, {"head": head}, features[:, None], labels, 250):
            total += clipped_sum(part, 0.5)["head"]
        return total

    def ours() -> torch.Tensor:
        return clipped_softmax_sum(features, labels, head, 0.5)

    torch.testing.assert_close(ours(), plain().float(), rtol=1e-3, atol=1e-3)
    return "probe step (5,000 x 2,048, 10 classes) against vmap(grad)", ours, plain


def extraction() -> tuple[str, Work, Work]:
    """PatchNet features: cache-sized tiles against the same network as ordinary layers in batches."""
    net = random_patchnet(1600)
    images = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)

    def ours() -> torch.Tensor:
        return net.extract(images)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return torch.cat([net.features(net.normalise(batch)) for batch in images.split(16)])

    torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-4)
    return "patchnet features (1,600 filters, 64 images) against ordinary layers", ours, plain


def gradients() -> tuple[str, Work, Work]:
    """Per-example gradients of patchnet and head: closed form against automatic differentiation, one by one."""
    net = random_patchnet(800)
    generator = torch.Generator().manual_seed(2)
    whitener = whitening.fit(torch.rand(600, net.feature_dim, generator=generator), 512)
    model = Classifier(net, whitener, 10)
    model.head.data.normal_(generator=generator)
    views = torch.randint(256, (16, 1, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (16,), generator=generator)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    loss = loss_function(model, 1.0, torch.device("cpu"))

    def ours() -> dict[str, torch.Tensor]:
        return closed_form_gradients(model, views, labels)

    def plain() -> list[dict[str, torch.Tensor]]:
        return list(per_example_gradients(loss, parameters, views, labels, 1))

    torch.testing.assert_close(ours()["head"][3], plain()[3]["head"][0], rtol=1e-2, atol=1e-5)
    return "per-example gradients (800 filters, 16 images) against autograd", ours, plain


def random_patchnet(filters: int) -> PatchNet:
    """Random unit-norm filters."""
    net = PatchNet(filters)
    net.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    net.weight.data.div_(net.weight.data.norm(dim=1, keepdim=True))
    return net


if __name__ == "__main__":
    main()
