"""Public images made by random processes, the prior of the feature extractor.

Nothing here reads data: an image is a function of (process, seed, block, position in the block, resolution) and of
nothing else, so it costs no privacy, and any number of workers in any order makes the same bytes. (The bytes are those
of one processor type and one version of NumPy and PyTorch: another may round differently in the last bit.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dprandp.errors import UsageError, nearest
from dprandp.synth import dead_leaves, stylegan

Process = Callable[[np.random.Generator, int, int], np.ndarray]

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ProcessSpec:
    """One random process.

    Attributes:
        name: as given on the command line.
        render: (random, count, resolution) → uint8 [count, resolution, resolution, 3].
        block_size: images that are made from one random generator and share what the process shares (a network).
        summary: one line.
        source: paper.
        default_resolution: pixels per side.
    """

    name: str
    render: Process
    block_size: int
    summary: str
    source: str
    default_resolution: int


_SOURCE = "Baradad et al., Learning to See by Looking at Noise, NeurIPS 2021"

PROCESSES: dict[str, ProcessSpec] = {
    spec.name: spec
    for spec in (
        ProcessSpec(
            name="stylegan-oriented",
            render=stylegan.render,
            block_size=400,
            summary="untrained StyleGAN2 networks with oriented wavelets as filters, a new network every 400 images",
            source=_SOURCE,
            default_resolution=64,
        ),
        ProcessSpec(
            name="dead-leaves",
            render=dead_leaves.render,
            block_size=100,
            summary="opaque circles, squares, rectangles, triangles and quadrilaterals of power-law size, overlapping",
            source=_SOURCE,
            default_resolution=64,
        ),
    )
}


def process_named(name: str) -> ProcessSpec:
    """Look a process up.

    Raises:
        UsageError: no process has that name.
    """
    if name not in PROCESSES:
        raise UsageError(
            f"there is no random process called {name!r}",
            fix=f"choose another --process; {nearest(name, PROCESSES)}",
        )
    return PROCESSES[name]


def block_generator(seed: int, process: str, block: int) -> np.random.Generator:
    """The generator of one block, a function of its arguments alone.

    A Philox generator whose 128-bit key is a hash of the three: blocks are independent of one another and of who
    renders them. Public randomness only: a seeded generator must never make the noise that protects private data.
    """
    digest = hashlib.sha256(f"dprandp synth\n{seed:d}\n{process}\n{block:d}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def render_block(process: str, seed: int, block: int, count: int, resolution: int) -> np.ndarray:
    """Render the first `count` images of a block.

    PyTorch works with one thread meanwhile, since the order of its sums depends on their number: the bytes are the same
    in every process, however many threads or workers there are. A smaller `count` gives a prefix.

    Args:
        process: a name in :data:`PROCESSES`.
        seed: public seed, any integer.
        block: position of the block, from 0.
        count: images, 1 to the block size of the process.
        resolution: pixels per side, one of :data:`RESOLUTIONS`.

    Returns:
        uint8 [count, resolution, resolution, 3].

    Raises:
        UsageError: an unknown process, or an argument out of its range.
    """
    spec = process_named(process)
    if resolution not in RESOLUTIONS:
        raise UsageError(
            f"{process} cannot render at a resolution of {resolution}",
            fix="choose a --resolution among " + ", ".join(map(str, RESOLUTIONS)),
        )
    if not 1 <= count <= spec.block_size:
        raise UsageError(
            f"a block of {process} holds 1 to {spec.block_size} images, {count} were asked for",
            fix="render more images as further blocks",
        )
    if block < 0:
        raise UsageError(f"block {block} does not exist", fix="count blocks from 0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return spec.render(block_generator(seed, process, block), count, resolution)
    finally:
        torch.set_num_threads(threads)
