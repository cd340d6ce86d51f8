"""Learn patch layers from synthetic images: whitening of patches, then a spherical k-means dictionary; layer by layer.

Source: Coates & Ng 2012, "Learning feature representations with k-means", with patches of images of a random process
in place of real ones, so nothing in this file costs privacy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dprandp.models.patchnet import PatchLayer, ResponseLayer, normalise_patches

PATCH_FLOOR = 0.1
"""Added to the eigenvalues of the patch covariance: directions with less energy are noise and stay small."""

CHANNEL_FLOOR = 0.1
"""The same for the channels of the second layer, relative to the mean of the eigenvalues that are kept."""

RESPONSE_CROPS = 3000
"""Crops for the whitening of the second layer's channels."""

RESPONSE_PATCHES, PATCHES_OF_A_CROP = 120_000, 40
"""Patches for learning the second layer (276 MB), and of one crop; all, and more crops, where it has fewer."""

OnIteration = Callable[[int, float], None]

Patches = Callable[[Tensor], Tensor]
"""From images uint8 [B, 3, H, W] to the input patches of a layer, [B, d, L]."""

BLOCK = 1024
"""Vectors that are compared with all atoms at a time."""


def learn(
    chain: tuple[PatchLayer, ...],
    crops: Tensor,
    count: int,
    iterations: int,
    generator: torch.Generator,
    on_iteration: OnIteration = lambda iteration, similarity: None,
) -> None:
    """Learn a chain of layers from images of a random process.

    Args:
        chain: filled in place: a ``PatchNet`` and optionally a ``ResponseLayer`` on top.
        crops: uint8 [N, 3, 32, 32], in random order.
        count: patches of pixels to learn from. iterations: passes of each k-means. generator: public randomness.
        on_iteration: as for ``spherical_kmeans``, counted through all dictionaries (one, or three for two layers).
    """
    first = chain[0]
    passes = itertools.count()

    def kmeans(vectors: Tensor, clusters: int) -> Tensor:
        return spherical_kmeans(
            vectors, clusters, iterations, generator, lambda _, similarity: on_iteration(next(passes), similarity)
        )

    def below(images: Tensor) -> Tensor:
        return first.pixel_patches(first.normalise(images))

    basis, centre, whitened = _whitened(sample_patches(crops, count, first.patch_size, generator), len(first.basis))
    _fill(first, basis=basis, centre=centre, weight=kmeans(whitened, len(first.weight)))
    if len(chain) == 1:
        return
    second = chain[1]
    atoms = kmeans(whitened, len(second.map_weight))
    del whitened
    _fill(second, map_weight=atoms @ basis, map_bias=-(atoms @ centre))
    channel_basis, channel_centre = channel_whitening(second, below, crops[:RESPONSE_CROPS])
    _fill(second, channel_basis=channel_basis, channel_centre=channel_centre)
    per_crop = min(PATCHES_OF_A_CROP, second.positions**2)
    chosen = crops[: -(-RESPONSE_PATCHES // per_crop)]
    responses = sample_response_patches(second, below, chosen, per_crop, generator)
    basis, centre, whitened = _whitened(responses, len(second.basis))
    del responses
    _fill(second, basis=basis, centre=centre, weight=kmeans(whitened, len(second.weight)))


def _whitened(patches: Tensor, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """A whitening's basis and centre, and the whitened patches."""
    basis, centre = whitening(patches, dims)
    return basis, centre, patches @ basis.t() - centre


@torch.no_grad()
def _fill(layer: PatchLayer, **values: Tensor) -> None:
    for name, value in values.items():
        getattr(layer, name).copy_(value)


@torch.no_grad()
def channel_whitening(layer: ResponseLayer, below: Patches, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise and whiten the channels of a layer's maps, and keep the components with the most energy.

    Args:
        layer: its ``map_weight`` and ``map_bias`` are learned already. below: its input patches.
        crops: uint8 [N, 3, H, W], *synthetic*.

    Returns:
        basis [C, 2 M] float32 = (Λ + floor)^(-1/2) Vᵀ / deviation, with Λ, V of the correlations over all positions of
        all maps and floor = ``CHANNEL_FLOOR`` times the mean of the C values kept, and centre [C] = basis @ mean.
    """
    channels, dims = layer.channel_basis.shape[1], len(layer.channel_basis)
    total, squares, count = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, channels).double(), 0
    for batch in crops.split(64):
        columns = layer.maps(below(batch)).transpose(0, 1).flatten(1).double()
        total += columns.sum(dim=1)
        squares += columns @ columns.t()
        count += columns.shape[1]
    mean = total / count
    covariance = squares / count - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp(min=0).sqrt() + 1e-3  # so that a weak channel is not amplified
    values, vectors = torch.linalg.eigh(covariance / torch.outer(deviation, deviation))
    values, vectors = values[-dims:].flip(0).clamp(min=0), vectors[:, -dims:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    scale = (values + CHANNEL_FLOOR * values.mean()).sqrt()
    basis = (vectors / scale / deviation[:, None]).t()
    return basis.float().contiguous(), (basis @ mean).float()


@torch.no_grad()
def sample_response_patches(
    layer: ResponseLayer, below: Patches, crops: Tensor, per_crop: int, generator: torch.Generator
) -> Tensor:
    """Patches of a layer's maps from random places of every crop, as ``layer.lift`` gives them: [N * per_crop, d].

    Places are drawn with replacement, unless all of them are asked for. All of the layer but its dictionary and
    ``basis`` is learned already; ``below`` gives its input patches.
    """
    chunks = []
    for batch in crops.split(64):
        patches = layer.lift(below(batch))
        if per_crop < patches.shape[2]:
            chosen = torch.randint(patches.shape[2], (len(batch), 1, per_crop), generator=generator)
            patches = patches.gather(2, chosen.expand(-1, patches.shape[1], -1))
        chunks.append(patches.transpose(1, 2).flatten(0, 1))
    return torch.cat(chunks)


def sample_patches(images: Tensor, count: int, patch_size: int, generator: torch.Generator) -> Tensor:
    """Contrast-normalised patches from random places of random images: uint8 [N, 3, H, W] to float32 [count, d].

    ``patch_size`` is their side in pixels; the generator is public randomness.
    """
    per_image = -(-count // len(images))
    chunks = []
    for batch in images.split(512):
        unfolded = functional.unfold(batch.to(torch.float32) / 255, patch_size)
        chosen = torch.randint(unfolded.shape[2], (len(batch), 1, per_image), generator=generator)
        patches = unfolded.gather(2, chosen.expand(-1, unfolded.shape[1], -1))
        chunks.append(normalise_patches(patches).transpose(1, 2).flatten(0, 1))
    patches = torch.cat(chunks)
    return patches[torch.randperm(len(patches), generator=generator)[:count]]


def whitening(patches: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """PCA whitening of vectors [N, d] float32, to the ``dims`` components r with the most energy.

    Returns:
        basis [r, d] = (Λ + ``PATCH_FLOOR``)^(-1/2) Vᵀ, float32, and centre [r] = basis @ mean, so that
        ``basis @ p - centre`` is the whitened patch. Eigenvectors' signs make their largest entry positive.
    """
    mean = patches.mean(dim=0)
    centred = (patches - mean).to(torch.float64)
    values, vectors = torch.linalg.eigh(centred.t() @ centred / len(patches))
    values, vectors = values[-dims:].flip(0), vectors[:, -dims:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    basis = (vectors / (values.clamp(min=0) + PATCH_FLOOR).sqrt()).t().to(torch.float32).contiguous()
    return basis, basis @ mean


def spherical_kmeans(
    vectors: Tensor,
    clusters: int,
    iterations: int,
    generator: torch.Generator,
    on_iteration: OnIteration = lambda iteration, similarity: None,
) -> Tensor:
    """Unit-norm atoms, [F, d] float32; a vector belongs to the atom with the largest |inner product|, with its sign.

    Args:
        vectors: [N, d] float32, whitened. clusters: number of atoms F. iterations: passes over the vectors.
        generator: public randomness (the starting atoms, and new ones where an atom lost all its vectors).
        on_iteration: called with the iteration and the mean |inner product| of a vector with its atom.
    """
    chosen = torch.randint(len(vectors), (clusters,), generator=generator)
    atoms = functional.normalize(vectors[chosen] + 1e-3 * torch.randn(clusters, vectors.shape[1], generator=generator))
    for iteration in range(iterations):
        sums = torch.zeros_like(atoms)
        members = torch.zeros(clusters)
        similarity = 0.0
        for block in vectors.split(BLOCK):
            products = block @ atoms.t()
            strength, nearest = products.abs().max(dim=1)
            signed = products.gather(1, nearest[:, None])  # the step of Coates & Ng: weight by the product itself
            sums.index_add_(0, nearest, signed * block)
            members.index_add_(0, nearest, torch.ones(len(block)))
            similarity += float(strength.sum())
        empty = members == 0
        if bool(empty.any()):
            fresh = torch.randint(len(vectors), (int(empty.sum()),), generator=generator)
            sums[empty] = vectors[fresh]
        atoms = functional.normalize(sums + 1e-12)
        on_iteration(iteration, similarity / len(vectors))
    return atoms
