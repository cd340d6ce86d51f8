"""Public images made by random processes, the prior of the feature extractor.

Nothing here reads data: an image is a function only of (process, seed, block, position in the block, resolution), so it
costs no privacy, and any number of workers in any order makes the same bytes (of one processor type and one version of
NumPy and PyTorch: another may round differently in the last bit).

To add a process: write a function as ``compose.Process`` describes it in a file of its own, and give it a line in
:data:`PROCESSES`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dprandp.errors import UsageError, nearest
from dprandp.synth import dead_leaves, fractal, perlin, statistical, stylegan, stylegan_random
from dprandp.synth.compose import Process, kmeans_leaves, mixture
from dprandp.synth.stylegan_draws import HIGHFREQ, SPARSE

RESOLUTIONS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ProcessSpec:
    """One random process."""

    name: str  # as given on the command line
    render: Process  # the function that makes the images
    block_size: int  # images that are made from one random generator and share what the process shares (a network)
    summary: str  # one line
    source: str  # paper


_BARADAD = "Baradad et al., Learning to See by Looking at Noise, NeurIPS 2021"
_KML = "K-Means Leaves, ICML 2025"


def _statistical(*, spectrum: bool = False, wmm: bool = False, colour: bool = False) -> Process:
    return partial(statistical.render, spectrum=spectrum, wmm=wmm, colour=colour)


PROCESSES: dict[str, ProcessSpec] = {
    spec.name: spec
    for spec in (
        ProcessSpec(
            "stylegan-oriented", stylegan.render, 400,
            "untrained StyleGAN2 networks with oriented wavelets as filters, a new network every 400 images", _BARADAD,
        ),
        ProcessSpec(
            "stylegan-random", stylegan_random.render, 400, "the same with Gaussian filters, without noise", _BARADAD
        ),
        ProcessSpec(
            "stylegan-highfreq", partial(stylegan.render, variant=HIGHFREQ), 400,
            "the same with wavelets quantised to their signs and noise in every layer", _BARADAD,
        ),
        ProcessSpec(
            "stylegan-sparse", partial(stylegan.render, variant=SPARSE), 400,
            "stylegan-highfreq with noise under a Laplace envelope, and biases", _BARADAD,
        ),
        ProcessSpec(
            "dead-leaves", dead_leaves.render, 100,
            "opaque circles, squares, rectangles, triangles and quadrilaterals of power-law size, overlapping",
            _BARADAD,
        ),
        ProcessSpec(
            "dead-leaves-squares", partial(dead_leaves.render, kinds=("square",)), 100,
            "overlapping axis-aligned squares", _BARADAD,
        ),
        ProcessSpec(
            "dead-leaves-oriented", partial(dead_leaves.render, kinds=("oriented-square",)), 100,
            "overlapping turned squares", _BARADAD,
        ),
        ProcessSpec(
            "dead-leaves-textures", dead_leaves.render_textures, 400,
            "dead-leaves whose leaves show spectrum-color-wmm", _BARADAD,
        ),
        ProcessSpec("spectrum", _statistical(spectrum=True), 400, "noise with a power-law spectrum", _BARADAD),
        ProcessSpec(
            "spectrum-color", _statistical(spectrum=True, colour=True), 400,
            "noise with a power-law spectrum and the colours of a small palette", _BARADAD,
        ),
        ProcessSpec("wmm", _statistical(wmm=True), 200, "noise with heavy-tailed wavelet coefficients", _BARADAD),
        ProcessSpec(
            "spectrum-color-wmm", _statistical(spectrum=True, wmm=True, colour=True), 200,
            "noise with all three: spectrum, colours, wavelet coefficients", _BARADAD,
        ),
        ProcessSpec(
            "fractal", fractal.render, 400, "attractors of random iterated function systems",
            "Kataoka et al., Pre-training without Natural Images, ACCV 2020; Anderson and Farrell, WACV 2022",
        ),
        ProcessSpec(
            "perlin", perlin.render, 400, "octaves of gradient noise", "Perlin, Improving Noise, SIGGRAPH 2002"
        ),
    )
}  # fmt: skip

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
        return _kml(kind, process_named(rest))
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


def _kml(kind: str, source: ProcessSpec) -> ProcessSpec:
    summary = f"images of {source.name} mixed by blurred two-colour masks of another one"
    return ProcessSpec(
        f"{kind}:{source.name}", kmeans_leaves(source.render, LEAVES[kind]), KML_BLOCK, summary, _KML
    )


def _mixture(parts: list[ProcessSpec]) -> ProcessSpec:
    each = min(MIXTURE_BLOCK // len(parts) or 1, *(part.block_size for part in parts))
    names = [part.name for part in parts]
    sources = "; ".join(dict.fromkeys(part.source for part in parts))
    render = mixture([part.render for part in parts])
    return ProcessSpec("mixture:" + ",".join(names), render, len(parts) * each, "in turn: " + ", ".join(names), sources)


def block_generator(seed: int, process: str, block: int) -> np.random.Generator:
    """The generator of one block: Philox, with a hash of the three arguments as its key, so blocks are independent.

    Public randomness only: a seeded generator must never make the noise that protects private data.
    """
    digest = hashlib.sha256(f"dprandp synth\n{seed:d}\n{process}\n{block:d}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def render_block(process: str, seed: int, block: int, count: int, resolution: int) -> np.ndarray:
    """Render the first `count` images of a block.

    PyTorch works with one thread meanwhile, since the order of its sums depends on their number: the bytes are the same
    however many threads or workers there are. A smaller `count` gives a prefix.

    Args:
        process: a name as :func:`process_named` takes it.
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return spec.render(block_generator(seed, spec.name, block), count, resolution)
    finally:
        torch.set_num_threads(threads)
