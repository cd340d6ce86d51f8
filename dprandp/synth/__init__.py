"""Public images made by random processes, the prior of the feature extractor.

Nothing here reads data: an image is a function only of (process, seed, block, position in the block, resolution), so it
costs no privacy, and any number of workers in any order makes the same bytes (of one processor type and one version of
NumPy and PyTorch: another may round differently in the last bit).

To add a process: write a function as ``compose.Process`` describes it in a file of its own, and give it a line in
:data:`PROCESSES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dprandp.errors import UsageError, nearest
from dprandp.synth import dead_leaves, fractal, perlin, statistical, stylegan, stylegan_random
from dprandp.synth.compose import Process, kmeans_leaves, mixture, on_images

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ProcessSpec:
    """One random process."""

    name: str  # as given on the command line
    render: Process  # the function that makes the images
    block_size: int  # images that are made from one random generator and share what the process shares (a network)


def _statistical(*, spectrum: bool = False, wmm: bool = False, colour: bool = False) -> Process:
    return partial(statistical.render, spectrum=spectrum, wmm=wmm, colour=colour)


PROCESSES: dict[str, ProcessSpec] = {
    spec.name: spec
    for spec in (
        ProcessSpec("stylegan-oriented", stylegan.render, 400),
        ProcessSpec("stylegan-random", stylegan_random.render, 400),
        ProcessSpec("stylegan-highfreq", partial(stylegan.render, variant=stylegan.HIGHFREQ), 400),
        ProcessSpec("stylegan-sparse", partial(stylegan.render, variant=stylegan.SPARSE), 400),
        ProcessSpec("dead-leaves", dead_leaves.render, 100),
        ProcessSpec("dead-leaves-squares", partial(dead_leaves.render, kinds=("square",)), 100),
        ProcessSpec("dead-leaves-oriented", partial(dead_leaves.render, kinds=("oriented-square",)), 100),
        ProcessSpec("dead-leaves-textures", dead_leaves.render_textures, 400),
        ProcessSpec("spectrum", _statistical(spectrum=True), 400),
        ProcessSpec("spectrum-color", _statistical(spectrum=True, colour=True), 400),
        ProcessSpec("wmm", _statistical(wmm=True), 200),
        ProcessSpec("spectrum-color-wmm", _statistical(spectrum=True, wmm=True, colour=True), 200),
        ProcessSpec("fractal", fractal.render, 400),
        ProcessSpec("perlin", perlin.render, 400),
    )
}

ALIASES = {"dead-leaves-shapes": "dead-leaves"}
LEAVES = {"kml": 1, "kml-mixup": 2}
KML_BLOCK = 200
MIXTURE_BLOCK = 400
SYNTAX = (*(f"{name}:PROCESS" for name in LEAVES), "mixture:PROCESS,PROCESS,...")


def process_named(name: str) -> ProcessSpec:
    """Find a process, or compose it: ``kml:P``, ``kml-mixup:P``, ``mixture:P,Q,...``, where P and Q are such names too.

    Commas always belong to the outermost mixture. What is composed has a canonical name, the same for an alias.

    Raises:
        UsageError: a part of the name is no process, or something is missing.
    """
    name = ALIASES.get(name, name)
    if name in PROCESSES:
        return PROCESSES[name]
    kind, colon, rest = name.partition(":")
    if kind in LEAVES:
        if not rest:
            raise UsageError(f"{kind} needs a process to mix", fix=f"give, say, --process {kind}:stylegan-oriented")
        source = process_named(rest)
        return ProcessSpec(f"{kind}:{source.name}", kmeans_leaves(source.render, LEAVES[kind]), KML_BLOCK)
    if kind == "mixture":
        parts = [part.strip() for part in rest.split(",")]
        if len(parts) < 2 or not all(parts):
            raise UsageError(
                f"{name!r} does not name two or more processes",
                fix="give for example --process mixture:stylegan-oriented,dead-leaves",
            )
        return _mixture([process_named(part) for part in parts])
    if colon and kind in (*PROCESSES, *ALIASES):
        raise UsageError(
            f"{kind!r} takes no other process, {name!r} was asked for",
            fix=f"write --process {kind}, or one of {', '.join(SYNTAX)}",
        )
    suggestion = nearest(kind, (*PROCESSES, *ALIASES, *LEAVES, "mixture"))
    known = "known: " + ", ".join((*PROCESSES, *ALIASES, *SYNTAX))
    raise UsageError(
        f"there is no random process called {kind!r}",
        fix="choose another --process; " + (f"{suggestion} {known}" if suggestion.startswith("did") else known),
    )


def _mixture(parts: list[ProcessSpec]) -> ProcessSpec:
    each = min(MIXTURE_BLOCK // len(parts) or 1, *(part.block_size for part in parts))
    name = "mixture:" + ",".join(part.name for part in parts)
    return ProcessSpec(name, mixture([part.render for part in parts]), len(parts) * each)


def block_generator(seed: int, process: str, block: int) -> np.random.Generator:
    """The generator of one block: Philox, with a hash of the three arguments as its key, so blocks are independent.

    Public randomness only: a seeded generator must never make the noise that protects private data.
    """
    digest = hashlib.sha256(f"dprandp synth\n{seed:d}\n{process}\n{block:d}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def render_block(
    process: str, seed: int, block: int, count: int, resolution: int, told: Callable[[int], None] | None = None
) -> np.ndarray:
    """Render the first `count` images of a block: uint8 [count, resolution, resolution, 3].

    PyTorch works with one thread meanwhile, since the order of its sums depends on their number: the bytes are the same
    however many threads or workers there are.

    Args:
        process: a name as :func:`process_named` takes it. seed: public, any integer. block: its position, from 0.
        count: images, 1 to the block size of the process. resolution: pixels per side, one of :data:`RESOLUTIONS`.
        told: called with the number of further images as they are made; their sum may differ from ``count``.

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    token = on_images.set(told or on_images.get())
    try:
        return spec.render(block_generator(seed, spec.name, block), count, resolution)
    finally:
        on_images.reset(token)
        torch.set_num_threads(threads)
