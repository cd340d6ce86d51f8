"""What a stage will roughly cost in disk, memory and time, from its configuration and declared facts alone.

Sizes are those of the largest arrays. Times are *estimates*: the rates below, taken once on two CPU cores with AVX-512
and scaled by the work that the configuration names; another processor may be several times faster or slower. On an
accelerator nothing is known, and nothing is said (None).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from dprandp.config import GenerateConfig, PretrainConfig
from dprandp.pretrain_config import extractors_of
from dprandp.stages.extraction import BATCH, BLOCK_BYTES
from dprandp.vision.dictionary import PATCHES_OF_A_CROP, RESPONSE_PATCHES
from dprandp.vision.extractors import NF_RESNET, build_extractor
from dprandp.vision.images import INPUT_SIZE
from dprandp.vision.patchnet import PatchLayer
from dprandp.vision.response_layer import ResponseLayer
from dprandp.vision.vit import EXPANSION, parse_vit
from dprandp.vision.wrn import parse_wrn

FLOAT = 4
PROGRAM_BYTES = 400e6
"""A process that has loaded torch."""

# Seconds of one core. An image: the same within a quarter for both processes at 32, 64 and 128 pixels.
IMAGE_SECONDS, PIXEL_SECONDS = 0.003, 8e-7
DICTIONARY_FLOPS = 6e9  # a second
PATCHNET_FLOPS = 25e9
RESPONSE_LAYER_FLOPS = 25e9
WRN_16_4_FORWARD, WRN_16_4_TRAINING, WRN_16_4_PER_EXAMPLE = 75.0, 38.0, 36.0  # views a second
NF_RESNET_WORK = 0.21  # of wrn-16-4's, at 32 pixels: products of a forward pass
WRN_16_4_OPERATIONS = 0.8e9  # of one image
HEAD_FLOPS = 10e9


@dataclass(frozen=True)
class Cost:
    """Bytes that stay on disk, bytes in memory at the worst moment, and seconds (None where nothing is known)."""

    disk_bytes: int
    memory_bytes: int
    seconds_estimate: float | None

    def plus(self, seconds: float | None) -> Cost:
        """The same with further work."""
        known = self.seconds_estimate is not None and seconds is not None
        return Cost(self.disk_bytes, self.memory_bytes, self.seconds_estimate + seconds if known else None)

    def rounded(self) -> dict[str, Any]:
        """Plain values, without digits that mean nothing."""
        seconds = self.seconds_estimate
        return {
            "disk_bytes": int(float(f"{self.disk_bytes:.2g}")),
            "memory_bytes": int(float(f"{self.memory_bytes:.2g}")),
            "seconds_estimate": None if seconds is None else float(f"{max(1.0, seconds):.2g}"),
        }


@dataclass(frozen=True)
class Extractor:
    """Public facts about an architecture: its parameters, all its tensors, its features and their parts, its work."""

    arch: str
    parameters: int
    state_bytes: int
    feature_dim: int
    part_widths: tuple[int, ...]
    forward_seconds: float
    training_seconds: float
    per_example_seconds: float

    def whitened(self, dims: int, statistics: int) -> int:
        """Dimensions after whitening: ``dims`` axes of each part, or as many as ``statistics`` images allow."""
        return len(self.part_widths) * min(dims, statistics - 1, *self.part_widths)

    def whitener_bytes(self, dims: int) -> int:
        """Of a whitener to so many dimensions in all."""
        return self.feature_dim * dims // len(self.part_widths) * FLOAT


def extractor_facts(config: PretrainConfig) -> Extractor:
    """Lay an extractor out without memory and look at it.

    Raises:
        UsageError: unknown architecture, or sizes that do not fit together.
    """
    with torch.device("meta"):
        network = build_extractor(config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    state = sum(tensor.numel() for tensor in network.state_dict().values()) * FLOAT
    if config.arch == "patchnet":
        pixels = 3 * config.patch_size**2
        side = (INPUT_SIZE - config.patch_size) // config.stride + 1
        forward = 2 * side**2 * pixels * config.filters / PATCHNET_FLOPS
        for below, layer in pairwise(network.chain):
            forward += _response_layer_products(layer, below) / RESPONSE_LAYER_FLOPS
        forward *= 2 if config.rotation else 1
        widths = tuple(part.width for part in network.parts)
        return Extractor(config.arch, parameters, state, network.feature_dim, widths, forward, 0.0, 3 * forward)
    work = _work(config.arch)
    rates = (WRN_16_4_FORWARD, WRN_16_4_TRAINING, WRN_16_4_PER_EXAMPLE)
    widths = tuple(part.width for part in network.parts)
    return Extractor(config.arch, parameters, state, network.feature_dim, widths, *(work / rate for rate in rates))


def _work(arch: str) -> float:
    """Operations of one image, in units of those of wrn-16-4."""
    if arch.startswith("vit-"):
        depth, width, patch = parse_vit(arch)
        patches = (INPUT_SIZE // patch) ** 2
        block = 2 * patches * width**2 * (4 + 2 * EXPANSION) + 4 * patches**2 * width
        return (depth * block + 2 * patches * width * 3 * patch**2) / WRN_16_4_OPERATIONS
    if arch == NF_RESNET:
        return NF_RESNET_WORK
    depth, width = parse_wrn(arch)
    return (depth - 4) / 12 * (width / 4) ** 2


def _response_layer_products(layer: ResponseLayer, below: PatchLayer) -> int:
    """Floating-point operations in the matrix products of one image."""
    places, (axes, width) = layer.positions**2, layer.basis.shape
    return 2 * (below.positions**2 * layer.map_weight.numel() + places * axes * (width + len(layer.weight)))


def generate_cost(config: GenerateConfig, workers: int, block: int) -> Cost:
    """Images on disk; every worker holds one block of them."""
    image = 3 * config.resolution**2
    seconds = config.count * (IMAGE_SECONDS + PIXEL_SECONDS * config.resolution**2)
    workers = max(1, min(workers, -(-config.count // block)))
    processes = workers + (workers > 1)
    memory = processes * PROGRAM_BYTES + workers * 10 * min(block, config.count) * image
    return Cost(config.count * image, int(memory), seconds / workers)


def pretrain_cost(config: PretrainConfig, images: GenerateConfig, cpu: bool, cores: int) -> Cost:
    """A dictionary of patches, or contrastive steps on all images."""
    facts = extractor_facts(config)
    weights = facts.state_bytes
    if config.arch == "patchnet":
        patches = config.dictionary_patches * 3 * config.patch_size**2
        memory = 3 * patches * FLOAT + config.dictionary_patches * 3 * INPUT_SIZE**2
        seconds = 2 * patches * config.filters * config.dictionary_iterations / DICTIONARY_FLOPS
        with torch.device("meta"):
            _, *further = build_extractor(config).chain
        for layer in further:
            axes, width = layer.basis.shape
            count = min(RESPONSE_PATCHES, images.count * min(PATCHES_OF_A_CROP, layer.positions**2))
            memory = max(memory, 3 * count * width * FLOAT)
            seconds += 2 * count * axes * len(layer.weight) * config.dictionary_iterations / RESPONSE_LAYER_FLOPS
    else:
        count = images.count if config.images == "disk" else config.pool
        memory = count * 3 * images.resolution**2 + 6 * weights + config.batch_size * 40e6
        seconds = 2 * config.batch_size * config.steps * facts.training_seconds
        weights *= 5  # two checkpoints with their momentum beside the result
    if (learned := len(extractors_of(config))) > 1:  # one after the other
        weights, seconds = learned * weights, learned * seconds
    if config.random_init or config.prior:
        memory, seconds = weights, 0.0
    return Cost(weights, int(PROGRAM_BYTES + memory), seconds / cores if cpu else None)


def probe_cost(
    facts: Extractor, *, train: int, test: int, statistics: int, dims: int, classes: int, steps: int, views: int,
    mirror: bool, cpu: bool, cores: int,
) -> Cost:  # fmt: skip
    """Features of all images once; then steps on the features, which stay on the disk.

    They are read through a memory map: beside ``memory_bytes`` the operating system uses what memory is free for them,
    and needs none. Where all of them fit, steps run at the speed of memory; where they do not, at that of the disk.
    """
    passes = (train * views + test + statistics) * (2 if mirror else 1)
    features = train * views * dims * FLOAT
    small = min(statistics, facts.feature_dim)
    whitening = statistics * facts.feature_dim * FLOAT + 3 * small**2 * FLOAT
    blocks = 4 * max(BLOCK_BYTES, BATCH * views * max(dims, facts.feature_dim) * FLOAT)
    memory = PROGRAM_BYTES + (train + test) * 3 * INPUT_SIZE**2 + max(whitening, blocks)
    seconds = passes * facts.forward_seconds + 4 * steps * train * views * dims * classes / HEAD_FLOPS
    whitener = facts.whitener_bytes(dims)
    disk = features + test * dims * FLOAT + 3 * whitener + facts.state_bytes
    return Cost(int(disk), int(memory + whitener), seconds / cores if cpu else None)


def finetune_cost(
    facts: Extractor, *, train: int, test: int, dims: int, classes: int, expected_batch: float, steps: int,
    views: float, refit_steps: int, mirror: bool, cpu: bool, cores: int,
) -> Cost:  # fmt: skip
    """Per-example gradients of every parameter; then, where there is a refit, features of all images again, on disk."""
    parameters = facts.state_bytes + dims * classes * FLOAT
    features = train * dims * FLOAT if refit_steps else 0
    passes = test * (2 if mirror else 1) + (train * (2 if mirror else 1) if refit_steps else 0)
    seconds = expected_batch * steps * views * facts.per_example_seconds + passes * facts.forward_seconds
    seconds += 4 * refit_steps * train * dims * classes / HEAD_FLOPS
    whitener = facts.whitener_bytes(dims)
    batch = expected_batch * views * 3 * INPUT_SIZE**2 * 5 + 16 * parameters
    pixels, tested = (train + test) * 3 * INPUT_SIZE**2, test * dims * FLOAT
    memory = PROGRAM_BYTES + pixels + tested + whitener + 5 * parameters + batch
    return Cost(int(8 * parameters + features + whitener), int(memory), seconds / cores if cpu else None)


def size_text(count: float) -> str:
    """Bytes for people: ``49 MB``."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{float(f'{count / unit:.2g}'):g} {name}"


def time_text(seconds: float | None) -> str:
    """Seconds for people, as the estimate that it is."""
    if seconds is None:
        return "time unknown on this device"
    if seconds < 90:
        return f"about {seconds:.0f} s (estimate)"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min (estimate)"
    return f"about {seconds / 3600:.1f} h (estimate)"
