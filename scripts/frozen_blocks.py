#!/usr/bin/env python3
"""What whole frozen blocks save: time and memory of a step's clipped sum, for several parts that are trained.

    python scripts/frozen_blocks.py
    python scripts/frozen_blocks.py --arch wrn-16-4 --views 4

Each line is a process of its own: per-example gradients of the same made-up images, with the last blocks of the network
trained (``--freeze last --scope block --keep ...``). With one view the outputs of frozen blocks are kept, so the first
step that sees an image computes them and later ones do not; both are timed. Beside them a mask over single weights
(``--freeze random --keep 0.1``), which saves neither. Memory is the growth of the process's largest resident size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from dprandp.config import schema
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.dpsgd.masks import choose_blocks, rule_of
from dprandp.finetune import start_model

STEPS = 3


def main() -> None:
    """Measure each part in a process of its own, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="wrn-16-1")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--keep", nargs="+", default=["1", "0.5", "0.25", "mask"], help="parts, or mask")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args, args.one)))
        return
    print("| trained | trained weights | first step, s | later steps, s | memory, MB |\n|---|---|---|---|---|")
    for keep in args.keep:
        command = [sys.executable, __file__, "--one", keep]
        for name in ("arch", "views", "batch", "microbatch"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        row = json.loads(done.stdout)
        what = "a tenth of single weights" if keep == "mask" else f"{row['blocks']} blocks"
        seconds = f"{row['first']:.2f} | {row['later']:.2f}"
        print(f"| {what} | {row['weights']:,} | {seconds} | {row['megabytes']:.0f} |", flush=True)


def measure(args: argparse.Namespace, keep: str) -> dict:
    """Seconds of the first step and the mean of the later ones, and the memory they took."""
    torch.set_num_threads(1)
    masked, whole = keep == "mask", keep == "1"
    given = {"freeze": "random", "keep": 0.1} if masked else {"freeze": "last", "scope": "block", "keep": float(keep)}
    settings = schema.build("finetune", {"source": "scratch", "arch": args.arch, **({} if whole else given)})
    model, _ = start_model(settings, 10)
    generator = torch.Generator().manual_seed(0)
    model.head.data.normal_(generator=generator)
    rule = rule_of(settings)
    blocks = choose_blocks(rule, model) if rule is not None and not masked else None
    trained = [name for name, _ in model.named_parameters() if blocks is None or blocks.trains(name)]
    parameters = {name: model.get_parameter(name).detach().clone() for name in trained}
    masks = rule.choose(parameters, 0) if masked else None
    images = torch.randint(256, (args.batch, 3, 32, 32), generator=generator).to(torch.uint8)
    batch = Batch(images, torch.arange(args.batch) % 10, torch.arange(args.batch))
    sums = ClippedSums(model, SumSettings(
        scale=1.0, views=args.views, seed=0, flip=True, clip_norm=1.0, microbatch=args.microbatch,
        frozen_first=0 if blocks is None else blocks.first,
    ))  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for step in range(1 + STEPS):
        started = time.process_time()  # of this process alone, on whatever else the machine is doing
        sums.of(parameters, step, batch, masks)
        seconds.append(time.process_time() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    chosen = {name: int(mask.sum()) for name, mask in (masks or {}).items()}
    weights = sum(chosen.get(name, value.numel()) for name, value in parameters.items())
    units = [f"extractor.{name}." for name, _ in model.extractor.units()]
    count = "all" if blocks is None else sum(any(name.startswith(unit) for name in trained) for unit in units)
    later = sum(seconds[1:]) / STEPS
    return {"first": seconds[0], "later": later, "megabytes": grown, "weights": weights, "blocks": count}


if __name__ == "__main__":
    main()
