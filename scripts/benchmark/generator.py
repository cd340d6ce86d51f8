"""Phase I, images: ``stylegan-oriented`` against the dense network, and every other process against it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from benchmark import peer_stylegan
from benchmark.cases import OURS, Case, Comparison, Limit, Side
from benchmark.pairs import agree
from dprandp.errors import BenchmarkError
from dprandp.synth import PROCESSES, process_named, stylegan

DENSE = "dense StyleGAN2"

BLOCK = PROCESSES["stylegan-oriented"].block_size
"""Images that share a network."""

DENSE_SIZES = {  # resolution, images of a call of ours (whole chunks), of the dense one
    "full": (64, BLOCK, 2),
    "quick": (64, BLOCK // 4, 1),
    "tiny": (8, stylegan.CHUNK, 2),
}
PROCESS_SIZES = {"full": (64, 40), "quick": (32, 20), "tiny": (8, 4)}  # resolution, images


def dense_case(scale: str) -> Case:
    """One thread each, draws included; the renderer shares nothing with the dense network but the draws.

    Ours draws the network for a block of images as well; the dense side, a couple of images a call, is given one.
    """
    resolution, ours, theirs = DENSE_SIZES[scale]

    def check() -> Mapping[str, float]:
        random = np.random.default_rng(0)
        network = stylegan.draw_network(random, resolution)
        draws = stylegan.draw_images(random, network, 2)
        return {
            DENSE: agree(DENSE, stylegan.synthesise(network, draws), peer_stylegan.synthesise(network, draws), 1e-4)
        }

    def dense():
        random = np.random.default_rng(1)
        network = stylegan.draw_network(random, resolution)
        return lambda: peer_stylegan.render(random, network, theirs)

    return Case(
        ours=Side(OURS, lambda: lambda: stylegan.render(np.random.default_rng(1), ours, resolution), ours),
        others=(
            Side(DENSE, dense, theirs),
        ),
        comparisons=(Comparison(DENSE, target=Limit(100)),),
        check=check,
        sizes=f"{resolution} px, 1 thread",
        unit="image",
        threads=1,
    )


def processes_case(scale: str) -> Case:
    """Every process against ``stylegan-oriented``: different images, so only their form is checked."""
    resolution, count = PROCESS_SIZES[scale]

    def side(name: str, called: str) -> Side:
        render = process_named(name).render
        return Side(called, lambda: lambda: render(np.random.default_rng(1), count, resolution), count)

    def check() -> Mapping[str, float]:
        for name, spec in PROCESSES.items():
            images = spec.render(np.random.default_rng(0), 2, resolution)
            if images.shape != (2, resolution, resolution, 3) or images.dtype != np.uint8 or images.std() == 0:
                raise BenchmarkError(f"{name} makes no images of {resolution} pixels", fix="see tests/synth")
        return {}

    ours = "stylegan-oriented"
    others = [name for name in PROCESSES if name != ours]
    return Case(
        ours=side(ours, OURS),
        others=tuple(side(name, name) for name in others),
        comparisons=tuple(
            Comparison(name, f"× the speed of {ours}", cost=True, target=Limit(1 / 5)) for name in others
        ),
        check=check,
        sizes=f"{resolution} px, {count} images, 1 thread",
        unit="image",
        threads=1,
    )


def images(resolution: int, count: int) -> torch.Tensor:
    """Synthetic images for the other pairs, uint8 [count, 3, resolution, resolution]."""
    made = process_named("dead-leaves").render(np.random.default_rng(3), count, resolution)
    return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()
